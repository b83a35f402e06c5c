"""A save is killed, or refused by the disk, at each of its system calls; whatever was there before is still there.

All points are tried in CI, see `sizes.py`; otherwise every fortieth, a different set for each case.
RUNMGR_ALL_ERRORS tries each error at each point; otherwise the errors take turns.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess

import pytest
import torch
from disk.syscalls import deny, in_child, with_fault
from sizes import size
from torch import nn

import runmgr
from runmgr.disk import checkpoints, directory

CALLS = ("openat", "write", "fsync", "link,linkat", "rename,renameat,renameat2", "unlink,unlinkat", "mkdir,mkdirat")
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "ESTALE", "EINTR")
pytestmark = pytest.mark.scales
STEP = size(40, 1)
ROUNDS = len(ERRORS) if os.environ.get("RUNMGR_ALL_ERRORS") else 1
CASES = ("first", "overwriting", "retention", "background", "average", "copying")


def _model():
    torch.manual_seed(0)
    return nn.Linear(20, 20)


def _template(root, case):
    """A run as it is before the save in question."""
    keep = runmgr.Keep(last=2) if case == "retention" else runmgr.Keep()
    model = _model()
    average = runmgr.BestAverage(model, k=2)
    with runmgr.start_run("points", ckpt_root_dir=root, monitor="acc", keep=keep) as run:
        for epoch in () if case == "first" else (1, 2, 3):
            average.update(epoch)
            run.save({"net": model, "average": average}, epoch=epoch, metrics={"acc": epoch % 3})
    return run.run_id


def _setup(root, case, run_id):
    if case == "copying":
        deny("link", "linkat", error=errno.EPERM)  # in the child that saves
    keep = runmgr.Keep(last=2) if case == "retention" else runmgr.Keep()
    model = _model()
    average = runmgr.BestAverage(model, k=2)
    run = runmgr.start_run("points", ckpt_root_dir=root, run_id=run_id, monitor="acc", keep=keep)
    run.restore({"net": model, "average": average} if case != "first" else {})
    return run, model, average


def _save(given, case):
    run, model, average = given
    average.update(9)
    if case == "average":
        run.save_average(average)
    else:
        run.save({"net": model, "average": average}, epoch=4, metrics={"acc": 9}, block=case != "background")
        run.wait()
    return 4


def _save_again(given, case):
    """Save, tell what was raised, and save again until nothing is: a thread meets the fault once."""
    run, model, average = given
    saves = [lambda: _save(given, case)]
    saves += [lambda: run.save({"net": model, "average": average}, epoch=5, metrics={"acc": 10})] * 3
    errors = []
    for save in saves:
        try:
            save()
        except (runmgr.RunError, OSError) as raised:
            errors.append(str(raised))
        else:
            return errors
    raise AssertionError(errors)


def _check(root, run_id, before, allowed, point):
    """Every file loads and is whole; latest is old or new, best no worse; the next start restores it and tidies up."""
    run = directory.RunDirectory(root / "points" / run_id)
    for path in [*run.path.glob("*.pth"), *run.objects_path.glob("*.pth")]:
        torch.load(path, weights_only=True)
    entries = checkpoints.read_all(run)
    for entry in entries:
        checkpoints.verify(run, entry)
    newest = max((entry.epoch for entry in entries if entry.kind == "checkpoint"), default=0)
    assert newest in allowed, point
    public = run.path / "ckpt_latest.pth"
    assert (torch.load(public, weights_only=True)["epoch"] if public.exists() else 0) in {before, newest}, point
    if before:
        assert torch.load(run.path / "ckpt_best.pth", weights_only=True)["metrics"]["acc"] in {2, 9, 10}, point
    with runmgr.start_run("points", ckpt_root_dir=root, run_id=run_id, monitor="acc") as again:
        assert again.restore({"net": _model()} if newest else {}).epoch == newest, point
        files = {path.name for path in run.path.rglob("*")}
        assert not [name for name in files if ".tmp-" in name], point
        listed = {entry.object_name: entry for entry in checkpoints.listed(run)}
        assert set(checkpoints.object_names(run)) == set(listed), point
        names = {name for entry in listed.values() for name in entry.names}
        assert {path.name for path in run.path.glob("*.pth")} == names, point
    return newest


def _points(case, tmp_path, function, faults):
    """Yield (point, root, ended) for each call that was hit, in a fresh copy of the run each time."""
    template = tmp_path / "template"
    run_id = _template(template, case)
    number = CASES.index(case)
    for call in CALLS:
        for nth in itertools.count(1):
            number += 1
            if number % STEP and nth > 1:
                if nth > 400:
                    break
                continue
            root = tmp_path / "root"
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(["cp", "-a", str(template), str(root)], check=True)  # hard links stay hard links
            fault = next(faults)
            ended = with_fault(
                lambda given: function(given, case), tmp_path / "log", call=call, nth=nth, fault=fault,
                setup=lambda root=root: _setup(root, case, run_id),
            )  # fmt: skip
            if not ended.was_hit:
                assert ended.error is None, (call, nth, ended.error)
                break
            yield f"{case}: {call} #{nth} {fault}", root, run_id, ended


@pytest.mark.needs("strace")
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_system_call_a_save_is_there_or_the_one_before_is(case, tmp_path):
    before = 0 if case == "first" else 3
    found, points = set(), 0
    for point, root, run_id, ended in _points(case, tmp_path, _save, itertools.repeat("signal=SIGKILL")):
        assert ended.was_killed, point
        found.add(_check(root, run_id, before, {before, before if case == "average" else 4}, point))
        points += 1
    print(f"{case}: {points} points")
    assert points >= 5
    if STEP == 1:
        assert found == {before, before if case == "average" else 4}


@pytest.mark.needs("strace")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_an_error_at_any_system_call_is_raised_and_the_next_save_succeeds(case, turn, tmp_path):
    faults = itertools.islice(itertools.cycle(f"error={error}" for error in ERRORS), turn, None)
    raised = points = 0
    for point, root, run_id, ended in _points(case, tmp_path, _save_again, faults):
        assert ended.error is None, (point, ended.error)
        assert len(ended.value) <= 2, (point, ended.value)
        raised += bool(ended.value)
        for error in ended.value:
            assert str(root) in error, (point, error)
            assert os.strerror(getattr(errno, point.rpartition("=")[2])) in error, (point, error)
        _check(root, run_id, 3, {5} if ended.value else {3 if case == "average" else 4}, point)
        points += 1
    print(f"{case}: {points} points, {raised} raised")
    assert raised > points / 3


@pytest.mark.parametrize("code", ["EPERM", "EOPNOTSUPP", "EMLINK", "EXDEV"])
def test_where_links_do_not_work_names_are_copies_and_everything_else_holds(code, tmp_path):
    def save():
        deny("link", "linkat", error=getattr(errno, code))
        run_id = _template(tmp_path, "overwriting")
        return run_id, _check(tmp_path, run_id, 3, {3}, code)

    run_id, newest = in_child(save)
    assert newest == 3
    run = tmp_path / "points" / run_id
    assert {path.stat().st_nlink for path in run.glob("*.pth")} == {1}
    assert json.loads((run / "run.json").read_text())["latest"]["epoch"] == 3
