"""What a test leaks fails that test: threads, environment, log handlers, process groups, open runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked ranks must not inherit a thread pool
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch
import torch.distributed as dist
from processes import LAUNCH_VARIABLES

from runmgr import start

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and then for whatever we start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_leaks(monkeypatch, tmp_path):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RUNMGR_CKPT_ROOT_DIR", str(tmp_path / "checkpoints"))
    threads, environ = set(threading.enumerate()), dict(os.environ)
    handlers = list(logging.getLogger("runmgr").handlers), list(logging.getLogger().handlers)
    yield
    leaked_run, start._open_run = start._open_run, None
    if leaked_run is not None:
        leaked_run.finish()
    assert leaked_run is None, f"the test left {leaked_run} open"
    assert not dist.is_initialized(), "the test left a process group"
    assert _without_pytest(os.environ) == _without_pytest(environ), "the test changed the environment"
    after = list(logging.getLogger("runmgr").handlers), list(logging.getLogger().handlers)
    assert after == handlers, "the test left log handlers"
    deadline = time.monotonic() + 2
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"the test left threads: {left}"


def _without_pytest(environ) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(("PYTEST_", "TORCHINDUCTOR_"))}


@pytest.fixture
def root(tmp_path) -> Path:
    """The default checkpoint root of this test."""
    return tmp_path / "checkpoints"


# Their tests take minutes together, and share nothing.
SPREAD = ("tests/test_resume.py", "tests/worker/test_every_call.py", "tests/test_pages.py")
LONGEST = (*SPREAD, "tests/cluster/test_slurm.py", "tests/cluster", "tests/test_packaging.py", "tests/test_digits.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests together, for its fixtures; those of some files go to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file in SPREAD else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items) -> None:
    """What takes longest comes first, so that nobody waits for it at the end."""
    items.sort(key=lambda item: next((place for place, name in enumerate(LONGEST) if item.nodeid.startswith(name)), 99))
    for item in items:
        if "needs" in item.keywords:
            _skip_without(item)


def _skip_without(item) -> None:
    """`@pytest.mark.needs("strace")`: skipped with a reason where the tool or module is missing, but never in CI."""
    import shutil
    from importlib.util import find_spec

    for (tool,) in (marker.args for marker in item.iter_markers("needs")):
        missing = (
            os.geteuid() != 0
            if tool == "root"
            else not (shutil.which(tool) or (tool.isidentifier() and find_spec(tool)))
        )
        if missing and not os.environ.get("RUNMGR_NO_SKIPS"):
            item.add_marker(pytest.mark.skip(reason=f"needs {tool}"))
