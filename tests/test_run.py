"""An open run: what its ranks get when a save or a restore fails, when one is told to stop, and what others find later."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from processes import run_ranks, values
from torch import nn
from worker.faults import fill, small_disk

import runmgr

HOSTILE = {
    "parent": "..", "slash": "a/b", "absolute": "/etc", "nul": "a\0b", "newline": "a\nb", "long": "x" * 300, "dash": "-rf",
    "dot": ".hidden", "empty": "", "blank": " ", "surrogate": "\udcff", "number": 3,
}  # fmt: skip


def _same_error(outcomes):
    faces = {(type(outcome.error).__name__, str(outcome.error)) for outcome in outcomes}
    assert len(faces) == 1, faces
    assert max(outcome.seconds for outcome in outcomes) < 10
    return outcomes[0].error


def _save_on_a_full_disk(rank, root):
    model = nn.Linear(64, 64)
    with runmgr.start_run("full", ckpt_root_dir=root) as run:
        run.save({"net": model}, epoch=1)
        if rank == 0:
            fill(root)
        run.save({"net": model}, epoch=2)


@pytest.mark.needs("root")
def test_a_save_on_a_full_disk_is_one_error_on_all_ranks_and_the_previous_checkpoint_is_whole(tmp_path):
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        error = _same_error(run_ranks(4, _save_on_a_full_disk, disk, store="group"))
        assert isinstance(error, runmgr.RankFailed)
        assert error.rank == 0
        assert "No space left on device" in str(error)
        assert str(disk) in str(error)
        (run,) = (disk / "full").glob("RUN_*")
        assert torch.load(run / "ckpt_latest.pth", weights_only=True)["epoch"] == 1
        assert not list(run.rglob("*.tmp-*"))


def _restore(rank, root):
    with runmgr.start_run("damaged", ckpt_root_dir=root, resume="latest") as run:
        return run.restore({"net": nn.Linear(2, 2)}).epoch


def _save_epochs(root, *epochs):
    with runmgr.start_run("damaged", ckpt_root_dir=root, keep=runmgr.Keep(last=None)) as run:
        for epoch in epochs:
            run.save({"net": nn.Linear(2, 2)}, epoch=epoch)
    return run.run_dir


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def test_a_damaged_latest_falls_back_to_the_older_one_loudly_on_all_ranks(root):
    run_dir = _save_epochs(root, 1, 2)
    _flip(run_dir / "ckpt_latest.pth")
    assert values(run_ranks(2, _restore, root)) == [1, 1]
    logs = "".join(path.read_text() for path in run_dir.glob("log_*.txt"))
    assert "WARNING runmgr.run: not restoring 0001-000002.pth" in logs


def test_no_whole_checkpoint_is_one_error_on_all_ranks(root):
    run_dir = _save_epochs(root, 1)
    _flip(run_dir / "ckpt_latest.pth")
    error = _same_error(run_ranks(4, _restore, root))
    assert isinstance(error, runmgr.CheckpointCorrupt)
    assert str(run_dir) in str(error)


def _until_stopped(rank, root):
    with runmgr.start_run("stopped", ckpt_root_dir=root) as run:
        for step in range(10_000):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.should_stop():
                return step
            time.sleep(0.001)
    return None


def test_a_signal_on_one_rank_stops_all_at_the_same_call(root):
    first, second = values(run_ranks(2, _until_stopped, root))
    assert first == second is not None
    assert runmgr.list_runs("stopped", root)[0].status == "preempted"


def _die(rank, root):
    with runmgr.start_run("dead", ckpt_root_dir=root):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_lost(root):
    assert [outcome.signal for outcome in run_ranks(1, _die, root)] == [signal.SIGKILL]
    assert runmgr.list_runs("dead", root)[0].status == "lost"


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_are_refused_and_nothing_is_created(root, name):
    for call in (
        lambda: runmgr.start_run(name),
        lambda: runmgr.start_run("exp", run_id=name),
        lambda: runmgr.start_run("exp", tags=[name]),
        lambda: runmgr.get_latest_run_id(name),
        lambda: runmgr.get_checkpoints_dir_path("exp", run_id=name),
        lambda: runmgr.get_run(name),
    ):
        with pytest.raises(runmgr.InvalidName):
            call()
    assert not root.exists()


def test_a_directory_of_super_gradients_is_listed_latest_and_loadable(root):
    path = root / "exp" / "RUN_20240102_030405_000006"
    path.mkdir(parents=True)
    model = nn.Linear(2, 2)
    saved = {
        "net": model.state_dict(),
        "acc": 0.5,
        "epoch": 7,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    torch.save(saved, path / "ckpt_latest.pth")
    assert [(info.run_id, info.status) for info in runmgr.list_runs("exp")] == [(path.name, "unknown")]
    assert runmgr.get_latest_run_id("exp", checkpoints_root_dir=root) == path.name
    other = nn.Linear(2, 2)
    with runmgr.start_run("exp", run_id=path.name) as run:
        assert run.load("latest")["acc"] == 0.5
        assert run.restore({"net": other}).epoch == 7
    assert torch.equal(other.weight, model.weight)
    with runmgr.start_run("exp", fork_from=path / "ckpt_latest.pth") as fork:
        assert fork.restore({"net": nn.Linear(2, 2)}).epoch == 7
    assert fork.run_id > path.name
