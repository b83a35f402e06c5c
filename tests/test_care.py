"""`runmgr tag | pin | export | rm | restore | prune | purge`, and their calls, as people and scripts use them."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from disk.holders import hold
from disk.shelves import damage
from disk.syscalls import deny, in_child
from processes import kill
from worker.faults import read_only, small_disk

import runmgr
from runmgr import cli
from runmgr.disk import claiming, directory, pruning, record


def _train(accuracy=0.5, experiment="digits", epochs=1, **options):
    """One short run; returns its directory."""
    with runmgr.start_run(experiment, monitor="acc", tags=["night"], **options) as run:
        state = {"net": torch.nn.Linear(100, 100)}
        before = run.restore(state).epoch
        for epoch in range(before, before + epochs):
            run.save(state, epoch=epoch + 1, step=10 * epoch, metrics={"acc": accuracy})
    return run.run_dir


def _call(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def _change_record(path, **changes):
    """Write other things into run.json, as an older or unluckier training would have."""
    record.RunRecord.read(directory.RunDirectory(path)).update(**changes)


def _ago(**given):
    return (datetime.now(UTC) - timedelta(**given)).isoformat()


def _ids(*paths):
    return [path.name for path in paths]


# Verify


def test_verify_all_tells_what_is_damaged_in_any_run(root, capsys):
    first, second, other = _train(), _train(), _train(experiment="other")
    (root / ".hidden").mkdir()
    sizes = "sizes and tables of contents; --deep reads every byte"
    assert _call(capsys, "verify", "--all") == (0, f"3 checkpoints of 3 runs, 0 damaged ({sizes})\n", "")
    assert _call(capsys, "verify", "--all", "digits")[1] == f"2 checkpoints of 2 runs, 0 damaged ({sizes})\n"
    damage(first / ".runmgr" / "checkpoints" / "0001-000001.pth", 3000)
    assert _call(capsys, "verify", "--all")[0] == 0
    status, out, _ = _call(capsys, "verify", "--all", "--deep")
    assert status == 1
    damaged, problem, summary = out.splitlines()
    assert damaged == f"DAMAGED  digits/{first.name}/0001-000001.pth  ckpt_latest.pth, ckpt_best.pth"
    assert "does not match its CRC-32" in problem
    assert summary == "3 checkpoints of 3 runs, 1 damaged (every byte read)"
    _, out, _ = _call(capsys, "verify", "--all", "--deep", "--json")
    told = {entry["run_id"]: entry["checkpoints"][0]["problem"] for entry in json.loads(out)}
    assert {name for name, problem in told.items() if problem is None} == {second.name, other.name}
    (second / "run.json").write_text(json.dumps(json.loads((second / "run.json").read_text()) | {"format": 99}))
    status, out, err = _call(capsys, "verify", "--all", "digits")
    assert (status, out) == (1, f"1 checkpoints of 1 runs, 0 damaged ({sizes})\n")
    assert "format" in err
    assert second.name in err
    assert _call(capsys, "verify")[2] == "runmgr: give a run, or --all\n"
    assert "did you mean digits?" in _call(capsys, "verify", "--all", "digit")[2]


# Tags


def test_tags_come_and_go_and_the_training_that_runs_overwrites_none(root, capsys):
    with runmgr.start_run("digits", tags=["night", "old"]) as run:
        assert (
            _call(capsys, "tag", "digits@-1", "good", "paper")[1] == f"{run.run_id} has the tags night old good paper\n"
        )
        assert _call(capsys, "untag", "digits@-1", "night", "paper", "never")[0] == 0
        run.save({"net": torch.nn.Linear(1, 1)}, epoch=1)
    assert runmgr.get_run("digits").tags == ("old", "good")
    assert json.loads((run.run_dir / "run.json").read_text())["tags"] == ["night", "old"], "the training's own"
    assert runmgr.tag_run("digits", "night", "good") == ("night", "old", "good")
    assert [found.run_id for found in runmgr.list_runs("digits", tags="good")] == [run.run_id]


def test_tags_given_at_the_same_moment_are_all_there(root):
    path = _train()
    pids = []
    for number in range(8):
        pid = os.fork()
        if not pid:
            runmgr.tag_run(path, *(f"tag-{number}-{count}" for count in range(5)))
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert len(runmgr.get_run("digits").tags) == 41


@pytest.mark.parametrize("tag", ["-x", "a/b", "", "..", "a\nb"])
def test_a_tag_that_would_leave_its_place_is_refused(root, tag):
    path = _train()
    with pytest.raises(runmgr.InvalidName):
        runmgr.tag_run(path, "fine", tag)
    assert runmgr.get_run("digits").tags == ("night",)


# Export


def test_an_exported_checkpoint_is_a_copy_that_may_be_written_to(root, tmp_path, capsys):
    path = _train()
    umask = os.umask(0o027)
    try:
        status, out, _ = _call(capsys, "export", "digits", str(tmp_path / "model.pth"))
    finally:
        os.umask(umask)
    assert (status, out) == (
        0,
        f"{tmp_path}/model.pth is ckpt_latest.pth of {path.name}, {out.split()[-3]} kB, checked\n",
    )
    copy = tmp_path / "model.pth"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640
    content = torch.load(copy, weights_only=True)
    torch.save({"net": content["net"], "mine": 1}, copy)
    assert torch.load(path / "ckpt_latest.pth", weights_only=True).keys() == content.keys()
    assert [checked.problem for checked in runmgr.verify_run(path, deep=True)] == [None]
    assert runmgr.export_checkpoint(path, tmp_path, "best") == tmp_path / "ckpt_best.pth"


def test_export_overwrites_nothing_and_leaves_nothing_of_what_is_damaged_or_missing(root, tmp_path):
    path = _train()
    target = tmp_path / "out" / "model.pth"
    with pytest.raises(runmgr.InvalidInput, match="no directory"):
        runmgr.export_checkpoint(path, target)
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(runmgr.InvalidInput, match="nothing is overwritten"):
        runmgr.export_checkpoint(path, target)
    assert target.read_text() == "mine"
    target.unlink()
    with pytest.raises(runmgr.CheckpointNotFound, match=r"it has \['ckpt_best.pth', 'ckpt_latest.pth'\]"):
        runmgr.export_checkpoint(path, target, "ckpt_epoch_9.pth")
    damage(path / ".runmgr" / "checkpoints" / "0001-000001.pth", 3000)
    with pytest.raises(runmgr.CheckpointCorrupt):
        runmgr.export_checkpoint(path, target)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EXDEV])
def test_export_works_where_the_kernel_cannot_copy_nor_link(root, tmp_path, code):
    path = _train()

    def export():
        deny("copy_file_range", error=code)
        deny("link", "linkat", error=errno.EPERM)
        return runmgr.export_checkpoint(path, tmp_path / "model.pth").read_bytes()

    assert in_child(export) == (path / "ckpt_latest.pth").read_bytes()


# rm and restore


def test_rm_and_restore_take_several_and_one_that_fails_stops_no_other(root, capsys):
    first, pinned, last = (_train() for _ in range(3))
    runmgr.pin_checkpoint(pinned)
    status, out, err = _call(capsys, "rm", first.name, f"digits/{pinned.name}", str(last), "digits@-9", "digits/")
    assert status == 1
    assert out == "".join(
        f"{path.name} is in the trash; `runmgr restore digits/{path.name}` brings it back\n" for path in (first, last)
    )
    assert err.count("\n") == 3
    assert "pinned (0001-000001.pth)" in err
    assert "has no run @-9" in err
    assert f"to remove that, say digits/{last.name}" in err
    assert _ids(*(run.path for run in runmgr.list_runs("digits"))) == [pinned.name]
    status, out, err = _call(
        capsys, "restore", first.name, "RUN_20200101_000000_000000", f"digits/{last.name}", "--json"
    )
    assert status == 1
    assert [run["run_id"] for run in json.loads(out)["restored"]] == _ids(first, last)
    assert "no experiment in" in err
    assert len(runmgr.list_runs("digits")) == 3


@pytest.mark.parametrize("reference", ["digits", "{path}/run.json", "{path}/.."])
def test_rm_wants_to_be_told_exactly_which_run(root, reference):
    path = _train()
    with pytest.raises(runmgr.InvalidInput, match=f"say digits/{path.name}"):
        runmgr.remove_run(reference.format(path.name, path=path))
    assert path.exists()


def test_a_requeue_of_a_removed_run_begins_a_new_one_and_of_a_restored_one_goes_on(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("RUNMGR_LAUNCH_ID", "night-7")
        first = in_child(_train)
        runmgr.remove_run(first)
        second = in_child(_train)
        assert second > first
        assert in_child(_train) == second
        with pytest.raises(runmgr.RunNotFound, match="there is no run"):
            runmgr.start_run("digits", run_id=first.name)
        runmgr.restore_run(first.name)
        runmgr.remove_run(second)
        third = in_child(_train)
        assert third > second


def test_a_read_only_file_system_is_one_line_and_status_1(root, capsys):
    if os.geteuid():
        pytest.skip("needs root")
    path = _train()
    with read_only(root):
        prune = ("prune", "digits", "--keep-last", "0", "--yes")
        for command in (("rm", path.name), ("tag", "digits", "x"), ("pin", "digits"), prune):
            status, _, err = _call(capsys, *command)
            assert (status, err.count("\n")) == (1, 1), err
            assert "Read-only file system" in err
    assert runmgr.get_run("digits").path == path


def test_a_run_of_another_user_is_one_line_and_the_rest_goes_on(root, tmp_path):
    if os.geteuid():
        pytest.skip("needs root")
    theirs, ours = _train(), _train()
    base = Path(tempfile.gettempdir())
    for folder in (*root.parents, root, root / "digits"):
        if base in folder.parents:
            folder.chmod(0o777)
    subprocess.run(["chown", "-R", "12345", str(ours), str(root / "digits" / ".runmgr")], check=True)

    def prune():
        os.setuid(12345)
        done = pruning.plan_prune("digits", keep_last=0).carry_out()
        return [item.run.run_id for item in done.removed], [
            (item.run.run_id, str(error)) for item, error in done.failed
        ]

    removed, ((failed, error),) = in_child(prune)
    assert (removed, failed) == ([ours.name], theirs.name)
    assert "Permission denied" in error
    assert theirs.exists()


def test_runs_can_be_removed_and_purged_on_a_full_disk(root, tmp_path):
    if os.geteuid():
        pytest.skip("needs root")
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        path = _train(ckpt_root_dir=disk)
        with (disk / "ballast").open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                pass
        runmgr.remove_run(path)
        free = os.statvfs(disk).f_bfree
        assert runmgr.purge_trash("digits", ckpt_root_dir=disk) == [path.name]
        assert os.statvfs(disk).f_bfree > free


# prune and purge


def test_prune_only_tells_until_it_is_told_to(root, capsys):
    paths = [_train(accuracy) for accuracy in (0.9, 0.2, 0.9, 0.5)]
    status, out, _ = _call(capsys, "prune", "digits", "--keep-last", "1", "--keep-best", "1")
    assert status == 0
    lines = [line.split(maxsplit=2) for line in out.splitlines() if line.startswith("RUN_")]
    assert [(line[0], line[2].split(maxsplit=2)[-1]) for line in lines[2:]] == [
        (path.name, "not among the newest 1, not among the best 1") for path in (paths[2], paths[1])
    ]
    assert [(line[0], line[2]) for line in lines[:2]] == [
        (paths[3].name, "among the newest 1"), (paths[0].name, "among the best 1: acc 0.9"),
    ]  # fmt: skip
    assert out.splitlines()[-1].startswith("2 of 4 runs would go to the trash with --yes; ")
    assert len(runmgr.list_runs("digits")) == 4
    status, out, _ = _call(capsys, "prune", "digits", "--keep-last", "1", "--keep-best", "1", "--yes", "--json")
    told = json.loads(out)
    assert (status, told["removed"], told["errors"]) == (0, _ids(paths[2], paths[1]), [])
    assert [run["run_id"] for run in told["kept"]] == _ids(paths[3], paths[0])
    assert _ids(*(run.path for run in runmgr.list_runs("digits"))) == _ids(paths[3], paths[0])


def test_prune_never_takes_what_is_live_pinned_forked_from_foreign_or_may_be_continued(root):
    parent = _train()
    grandparent, elsewhere = _train(), _train()
    middle = _train(fork_from=grandparent.name)
    _train(experiment="other", fork_from=str(elsewhere / "ckpt_latest.pth"))
    pinned, preempted, failed, lost, old, unreadable = (_train() for _ in range(6))
    runmgr.pin_checkpoint(pinned)
    _change_record(preempted, status="preempted", ended=_ago(days=3))
    _change_record(failed, status="failed", created=_ago(hours=1), ended=_ago(minutes=5), latest=None)
    _change_record(lost, status="running", ended=None)
    _change_record(old, status="failed", ended=_ago(days=1), created=_ago(days=2), latest=None)
    (unreadable / "run.json").write_text("{")
    foreign = root / "digits" / "RUN_20200101_000000_000001"
    foreign.mkdir()
    (foreign / "ckpt_latest.pth").touch()
    live = claiming.create_run(directory.Experiment(root, "digits"), "token")[0]
    record.RunRecord(live, {"status": "running"}).update()
    holder = hold(live)
    try:
        child = _train(fork_from=parent.name)
        _train(fork_from=middle.name)  # the newest: it keeps its whole line
        plan = runmgr.plan_prune("digits", keep_last=1)
        kept = {item.run.run_id: item.why for item in plan.kept}
        assert {item.run.run_id for item in plan.going} == {parent.name, child.name, old.name}
        assert kept[live.run_id] == "live"
        assert kept[pinned.name] == "pinned: 0001-000001.pth"
        assert kept[middle.name].endswith("was forked from it")
        assert kept[grandparent.name] == f"{middle.name} was forked from it"
        assert kept[elsewhere.name].startswith("other/RUN_")
        assert kept[preempted.name].startswith("preempted: its launch may continue it")
        assert kept[failed.name] == "failed 5 minutes ago: its launch may continue it"
        assert kept[lost.name].startswith("lost ")
        assert kept[foreign.name] == kept[unreadable.name] == "not made by runmgr, or its run.json cannot be read"
        done = plan.carry_out()
        assert {item.run.run_id for item in done.removed} == {parent.name, child.name, old.name}
    finally:
        kill([holder])
        os.waitpid(holder, 0)


def test_prune_by_age_asks_when_a_run_was_last_touched(root):
    old, young = _train(), _train()
    _change_record(old, created=_ago(days=9), ended=_ago(days=8), latest=None)
    _change_record(young, created=_ago(days=9), ended=_ago(hours=30), latest=None)
    plan = runmgr.plan_prune("digits", older_than_s=7 * 86400)
    assert [(item.run.run_id, item.why) for item in plan.going] == [(old.name, "touched 8 days ago")]
    assert [(item.run.run_id, item.why) for item in plan.kept] == [(young.name, "touched 30 hours ago")]


def test_a_run_that_was_trained_on_pinned_or_opened_since_the_plan_stays(root):
    trained, pinned, live, gone, going = (_train() for _ in range(5))
    plan = runmgr.plan_prune("digits", keep_last=0)
    _train(run_id=trained.name)
    runmgr.pin_checkpoint(pinned)
    runmgr.remove_run(gone)
    holder = hold(directory.RunDirectory(live))
    try:
        done = plan.carry_out()
    finally:
        kill([holder])
        os.waitpid(holder, 0)
    assert [item.run.run_id for item in done.removed] == [going.name]
    assert {item.run.run_id: type(error) for item, error in done.kept} == {
        trained.name: runmgr.RunProtected, pinned.name: runmgr.RunProtected, live.name: runmgr.RunBusy,
    }  # fmt: skip
    assert done.failed == ()


@pytest.mark.needs("root")
def test_the_bytes_that_are_told_are_those_that_the_disk_gets_back(root, tmp_path):
    with small_disk(tmp_path / "disk", 64 << 20, "ext4") as disk:
        _train(ckpt_root_dir=disk)
        parent, other = _train(ckpt_root_dir=disk, epochs=3), _train(ckpt_root_dir=disk, epochs=3)
        runmgr.pin_checkpoint(other, ckpt_root_dir=disk)
        runmgr.unpin_checkpoint(other, ckpt_root_dir=disk)
        with (other / "sparse").open("wb") as file:
            file.truncate(1 << 30)
        child = _train(ckpt_root_dir=disk, fork_from=parent.name)
        os.link(parent / "ckpt_latest.pth", child / "kept.pth")
        plan = runmgr.plan_prune("digits", keep_last=0, ckpt_root_dir=disk)
        chosen = {parent.name, other.name}
        plan = runmgr.PrunePlan(going=tuple(item for item in plan.going if item.run.run_id in chosen), kept=())
        sizes = [
            int(
                subprocess.run(["du", "-s", "-B1", str(item.run.path)], capture_output=True, check=True).stdout.split()[
                    0
                ]
            )
            for item in plan.going
        ]
        assert [item.size_bytes for item in plan.going] == sizes
        plan.carry_out()
        runmgr.list_trash("digits", disk)
        os.sync()
        before = os.statvfs(disk)
        runmgr.purge_trash("digits", ckpt_root_dir=disk)
        os.sync()
        after = os.statvfs(disk)
        freed = (after.f_bfree - before.f_bfree) * before.f_frsize
        assert abs(freed - plan.freed_bytes) <= 4096, "a directory stays"
        assert plan.freed_bytes < sum(sizes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_last": -1},
        {"keep_best": 1.5},
        {"keep_last": True},
        {"older_than_s": -1},
        {"keep_best": 1, "metric": None},
    ],
)
def test_a_prune_that_means_nothing_is_refused(root, options):
    with runmgr.start_run("digits") as run:
        run.save({"net": torch.nn.Linear(1, 1)}, epoch=1)
    with pytest.raises(runmgr.InvalidInput):
        runmgr.plan_prune("digits", **options)


def test_prune_without_a_criterion_is_wrong_usage(root, capsys):
    _train()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["prune", "digits"])
    assert exit_.value.code == 2
    assert "--keep-last" in capsys.readouterr().err


def test_purge_lists_the_trash_and_empties_it_when_told_to(root, capsys):
    first, second = _train(), _train()
    assert _call(capsys, "purge", "digits") == (0, "", "nothing in the trash to purge\n")
    runmgr.remove_run(first)
    runmgr.remove_run(second)
    _, out, _ = _call(capsys, "purge", "digits")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == _ids(second, first)
    assert _call(capsys, "purge", "digits", "--older-than", "1h", "--yes")[:2] == (0, "0 runs are deleted for good\n")
    status, out, _ = _call(capsys, "purge", "digits", first.name, "--yes", "--json")
    assert (status, json.loads(out)["purged"]) == (0, [first.name])
    status, out, err = _call(capsys, "purge", "digits", first.name, "--yes")
    assert (status, out) == (1, "")
    assert "holds no run" in err
    assert _call(capsys, "purge", "digits", "--yes")[1] == "1 runs are deleted for good\n"
    assert runmgr.list_trash("digits") == []


def test_caring_for_runs_never_loads_torch(root):
    first, second = _train(), _train()
    commands = [
        ["tag", "digits", "x"], ["untag", "digits", "x"], ["pin", "digits"], ["unpin", "digits"], ["verify", "digits"],
        ["export", "digits", str(root / "model.pth")], ["rm", first.name], ["restore", first.name],
        ["prune", "digits", "--keep-last", "1", "--yes"], ["purge", "digits", "--yes"],
    ]  # fmt: skip
    code = (
        "import sys\nfor name in ('torch', 'tensorboard', 'numpy', 'rich'): sys.modules[name] = None\n"
        f"from runmgr import cli\nprint([cli.main(command) for command in {commands!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert done.stdout.splitlines()[-1] == str([0] * len(commands))
    assert _ids(*(run.path for run in runmgr.list_runs("digits"))) == [second.name]
