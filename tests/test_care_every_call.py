"""Whoever changes runs is killed at each system call that changes something: each run is whole, where it was or in the trash.

All points are tried in CI, see `sizes.py`; otherwise every fourth, a different set for each command.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter

import filelock  # noqa: F401  # before the children are forked, which then import nothing
import pytest
import torch
from disk.shelves import open_shelf
from disk.syscalls import in_child, with_fault
from sizes import size

import runmgr
from runmgr.disk import care, checkpoints, directory, pins, pruning, record, tags, trash, verification  # noqa: F401

CHANGING = {
    "write", "fsync", "link", "linkat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat",
    "utimensat", "copy_file_range", "fchmod", "ftruncate",
}  # fmt: skip
pytestmark = pytest.mark.scales
STEP = size(4, 1)
# What each command does, to the first of three runs; pruning takes two. Those of the second row need the first row done.
COMMANDS = {
    "rm": lambda run, *_: care.remove_run(run),
    "prune": lambda _run, experiment, _to: pruning.plan_prune(experiment, keep_last=1).carry_out(),
    "tag": lambda run, *_: care.tag_run(run, "good", "paper"),
    "untag": lambda run, *_: care.untag_run(run, "night", "early"),
    "pin": lambda run, *_: care.pin_checkpoint(run, "ckpt_epoch_2.pth"),
    "export": lambda run, _experiment, to: care.export_checkpoint(run, to / "model.pth"),
    "restore": lambda run, *_: care.restore_run(run),
    "purge": lambda _run, experiment, _to: trash.purge_trash(experiment),
    "unpin": lambda run, *_: care.unpin_checkpoint(run, "ckpt_epoch_2.pth"),
}
BEFORE = {"restore": "rm", "purge": "prune", "unpin": "pin", "untag": "tag"}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Three completed runs of one experiment, in each of which several checkpoints lie."""
    root = tmp_path_factory.mktemp("template") / "checkpoints"

    def train():
        for _ in range(3):
            with runmgr.start_run(
                "points", ckpt_root_dir=root, monitor="acc", keep=runmgr.Keep(last=2), tags=["night", "day"]
            ) as run:
                for epoch in (1, 2, 3):
                    run.save({"net": torch.nn.Linear(2, 2)}, epoch=epoch, metrics={"acc": epoch % 3})

    in_child(train)  # a process that has ended, as others' have
    return root


def _places(root):
    """Where each run lies: by its id, the directories that hold it."""
    experiment = directory.Experiment(root, "points")
    found = {}
    for folder in (experiment.path, experiment.trash_path):
        for name in os.listdir(folder) if folder.is_dir() else ():
            if directory.is_run_id(name):
                found.setdefault(name, []).append(directory.RunDirectory(folder / name))
    return found


def _content(run):
    """What a run holds, without temporaries, marks, and what is to be changed."""
    changing = {"lease", "pins", "tags"}
    return {
        path.relative_to(run.path): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file() and ".tmp-" not in path.name and not changing & set(path.relative_to(run.path).parts)
        and not path.name.startswith(("ckpt_pinned", "lease"))
        and record.look_at_json(path).get("status") != record.REMOVING
    }  # fmt: skip


def _check_runs(root, wanted, gone, point):
    """Each run is in one place, with all that it had; one that is being purged may be in none."""
    places = _places(root)
    assert {name: len(found) for name, found in places.items()} == dict.fromkeys(wanted.keys() - gone, 1) | {
        name: 1 for name in gone if name in places
    }, point
    for name, (run,) in places.items():
        assert _content(run) == wanted[name], point
        found = list(verification.check(run, checkpoints.listed(run)))
        assert len(found) == 2, point
        assert [problem for _, problem in found if problem] == [], point


def _final(root, exported):
    """What is visible in the end."""
    runs = {run.run_id: (run.tags, run.status) for run in runmgr.list_runs("points", root)}
    pinned = {name: pins.pinned_objects(run) for name, (run,) in _places(root).items()}
    names = {name: sorted(path.name for path in run.path.glob("*.pth")) for name, (run,) in _places(root).items()}
    lying = [item.run.run_id for item in runmgr.list_trash("points", root)]
    return runs, pinned, names, lying, os.listdir(exported)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_system_call_every_run_is_whole_and_the_command_can_be_given_again(
    command, template, tmp_path, root
):
    first = min(_places(template))
    start, exported = tmp_path / "start", tmp_path / "exported"

    def act(name=command):
        return COMMANDS[name](f"points/{first}", "points", exported)

    subprocess.run(["cp", "-a", str(template), str(root)], check=True)
    wanted = {name: _content(run) for name, (run,) in _places(root).items()}
    if command in BEFORE:
        act(BEFORE[command])
    shutil.move(root, start)
    outcomes, points = set(), _points(act, start, root, tmp_path / "log")
    chosen = points[list(COMMANDS).index(command) % min(STEP, len(points)) :: STEP]
    for call, nth in chosen:
        point = f"{command}: {call} #{nth}"
        _set_up(start, root, exported)
        before = _final(root, exported)
        ended = with_fault(act, tmp_path / "log", call=call, nth=nth, fault="signal=SIGKILL")
        assert ended.was_killed, point
        outcomes.add(_after_a_kill(root, exported, wanted, act, command, before, point))
    print(f"{command}: {len(chosen)} of {len(points)} points")
    assert len(points) >= 3
    assert outcomes == {False, True} or STEP > 1 or command not in {"rm", "restore", "export"}


def _set_up(start, root, exported):
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(exported, ignore_errors=True)
    exported.mkdir()
    subprocess.run(["cp", "-a", str(start), str(root)], check=True)  # hard links stay hard links


def _points(act, start, root, log):
    """Watch the command once: which calls that change something it makes, each with its number among those of its name."""
    _set_up(start, root, root.with_name("exported"))
    ended = with_fault(act, log, call="all", nth=65535, fault="signal=SIGKILL")
    assert ended.error is None
    counts, found = Counter(), {}
    for thread, call, rest in re.findall(r"^(\d+) +(\w+)\((.*)", log.read_text(), flags=re.MULTILINE):
        counts[thread, call] += 1
        if call in CHANGING or (call == "openat" and "O_CREAT" in rest):
            found[call, counts[thread, call]] = None
    return list(found)


def _after_a_kill(root, exported, wanted, act, command, before, point):
    """Check what is left, then do it again; returns whether the command had already done its work."""
    going = set(before[3]) if command == "purge" else set()
    _check_runs(root, wanted, going, point)
    for name in os.listdir(exported):
        if ".tmp-" not in name:
            torch.load(exported / name, weights_only=True)["net"]["weight"].add_(1)
            assert (exported / name).stat().st_nlink <= 2, point  # a temporary's name, but none in the run
    begun = time.monotonic()
    was_done = False
    try:
        act()
    except (runmgr.RunNotFound, runmgr.InvalidInput):  # it is in the trash, out of it, or exported already
        if command not in {"rm", "restore", "export"}:
            raise
        was_done = True
    assert time.monotonic() - begun < 4, (point, "the dead one was waited for")
    _check_runs(root, wanted, going, point)
    after = _final(root, exported)
    assert [name for name in after[4] if ".tmp-" not in name] == (["model.pth"] if command == "export" else []), point
    _check_final(command, before, after, point)
    for run_id in after[3]:
        run = trash.restore(directory.Experiment(root, "points"), run_id)
        assert not run.lease_path.exists(), point
        assert record.attempt_numbers(run) == [1], point
    for (run,) in _places(root).values():  # the next start finds its checkpoints and tidies up
        assert open_shelf(run).latest.epoch == 3, point
        assert not [path for path in run.path.rglob("*.tmp-*") if "pinned" not in path.name], point
    return was_done


def _check_final(command, before, after, point):
    (tags_before, *_), (runs, pinned, names, lying, _) = before, after
    ids = sorted({*tags_before, *before[3]})
    expected_trash = {"rm": ids[:1], "prune": ids[1::-1]}.get(command, [])
    assert lying == expected_trash, point
    assert set(runs) == {*ids} - set(expected_trash) - (set(before[3]) if command == "purge" else set()), point
    if ids[0] in runs:
        wanted = {"tag": ("night", "day", "good", "paper"), "untag": ("day", "good", "paper")}
        assert runs[ids[0]][0] == wanted.get(command, ("night", "day")), point
    if command == "pin":
        assert pinned[ids[0]] == {"0001-000002.pth"}, point
        assert "ckpt_pinned_epoch_2_0001-000002.pth" in names[ids[0]], point
    if command == "unpin":
        assert pinned[ids[0]] == set(), point
        assert not [name for name in names[ids[0]] if name.startswith("ckpt_pinned") and ".tmp-" not in name], point
