"""A run of its own for each test."""

from __future__ import annotations

import pytest

from runmgr.disk import claiming, directory


@pytest.fixture
def run(tmp_path):
    """A new run directory, in which nothing has been saved."""
    return claiming.create_run(directory.Experiment(tmp_path, "experiment"), "token")[0]
