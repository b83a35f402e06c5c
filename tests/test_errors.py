from __future__ import annotations

import json
import pickle
import re

import pytest

from runmgr import errors
from runmgr.errors import RunError, rebuild


def _tree(base):
    return [base, *(found for child in base.__subclasses__() for found in _tree(child))]


@pytest.mark.parametrize("kind", _tree(RunError), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickle_and_json_with_its_fields(kind):
    error = kind("what happened", path="/a", ranks=[1, 2])
    crossed = json.loads(json.dumps([kind.__name__, error.message, error.fields]))
    for copy in (pickle.loads(pickle.dumps(error)), rebuild(*crossed)):
        assert type(copy) is kind
        assert str(copy) == "what happened"
        assert (copy.path, copy.ranks) == ("/a", [1, 2])


def test_errors_are_what_callers_already_catch():
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.RunNotFound, FileNotFoundError)


def test_the_tree_at_the_top_of_the_file_is_complete():
    drawn = re.findall(r"^[ │]*[├└]── (\w+)", errors.__doc__, flags=re.MULTILINE)
    assert sorted(drawn) == sorted({kind.__name__ for kind in _tree(RunError)} - {"RunError"})


def test_an_unknown_name_from_a_later_version_is_still_a_run_error():
    assert type(rebuild("FromTheFuture", "text", {})) is RunError
