"""Which run a start opens: requeues, restarts within one, and rivals under one name, through start_run itself."""

from __future__ import annotations

import json
import os

import pytest
from processes import agent, run_ranks, values

import runmgr
from runmgr import opening
from runmgr.disk import claiming
from runmgr.errors import InvalidInput, RunError

JOB = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "test"}


def open_run(rank=0, **options):
    with runmgr.start_run("x", **options) as run:
        return run.run_id, run.attempt


def in_process(environ, function=open_run, **options):
    """Run one start in a process of its own, as every start of a launch is."""
    opening._starts.clear()

    def start(rank):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        return function(**options)

    (value,) = values(run_ranks(1, start, store="none", environ=environ))
    return value


def runs(root):
    return sorted(path.name for path in root.glob("x/RUN_*"))


def test_a_requeued_job_continues_its_run_and_a_second_training_in_it_is_new(root):
    first, second = in_process(JOB), in_process(JOB)
    assert first[0] != second[0]
    requeued = JOB | {"SLURM_RESTART_COUNT": "1"}
    assert [in_process(requeued) for _ in range(2)] == [(first[0], 2), (second[0], 2)]
    assert in_process(requeued)[0] not in {first[0], second[0]}
    assert len(runs(root)) == 3


def test_the_users_name_for_a_launch_goes_before_slurms(root):
    named = JOB | {"RUNMGR_LAUNCH_ID": "mine"}
    assert [in_process(named) for _ in range(2)] == [(runs(root)[0], 1), (runs(root)[0], 2)]
    assert sorted(path.name for path in (root / "x/.runmgr/launches").iterdir()) == ["id-mine.1"]


def test_latest_in_a_requeued_job_is_the_jobs_own_run_though_another_one_is_newer(root):
    def save_too(**options):
        with runmgr.start_run("x", **options) as run:
            run.restore({"n": 0})
            run.save({"n": 1}, epoch=1)
            return run.run_id, run.attempt

    old = in_process({}, save_too)
    assert in_process(JOB, save_too, resume="latest") == (old[0], 2)
    newer = in_process({}, save_too)
    assert newer[0] > old[0]
    assert in_process(JOB | {"SLURM_RESTART_COUNT": "1"}, save_too, resume="latest") == (old[0], 3)


def test_latest_is_the_newest_run_that_saved_though_its_name_is_gone(root):
    def save(**options):
        with runmgr.start_run("x", **options) as run:
            progress = run.restore(state := {"n": run.attempt})
            run.save(state, epoch=progress.epoch + 1)
            return run.run_id, progress.epoch

    in_process({}, save)
    newest, _ = in_process({}, save)
    in_process({})  # saved nothing
    (root / "x" / newest / "ckpt_latest.pth").unlink()
    later, _ = in_process({}, save)
    (root / "x" / later / "ckpt_latest.pth").unlink()
    record = json.loads((root / "x" / later / "run.json").read_text())
    (root / "x" / later / "run.json").write_text(json.dumps(record | {"format": 99}))  # of a version to come
    assert in_process({}, save, resume="latest") == (newest, 1)
    assert (root / "x" / newest / "ckpt_latest.pth").exists()


def test_a_start_that_fails_leaves_the_jobs_training_to_the_next_one(root):
    (first, _) = in_process(JOB, monitor="loss", mode="min")
    requeued = JOB | {"SLURM_RESTART_COUNT": "1"}
    with pytest.raises(InvalidInput, match="monitor"):
        in_process(requeued, monitor="accuracy")
    assert in_process(requeued, monitor="loss", mode="min")[0] == first
    assert runs(root) == [first]


def test_a_torchrun_restart_in_a_requeued_job_continues_what_the_requeue_did(root):
    def start(environ):
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return in_process(JOB | told | environ)

    with agent() as port:
        first = start({})
        assert start({}) == (first[0], 2)
    requeued = {"SLURM_RESTART_COUNT": "1"}
    with agent() as port:
        assert start(requeued) == (first[0], 3)
        assert start(requeued) == (first[0], 4)
    with agent() as port:
        assert start(requeued)[0] != first[0]  # a second torchrun in the requeued job
    assert len(runs(root)) == 2


def test_of_two_starts_at_once_under_one_name_the_later_continues_the_run_of_the_earlier(root, monkeypatch):
    create, rivals = claiming.create_run, []

    def create_after_a_rival(*args):
        if not rivals:
            rivals.append(None)
            rivals[0] = in_process({"RUNMGR_LAUNCH_ID": "mine"})
        return create(*args)

    with monkeypatch.context() as patch:
        patch.setenv("RUNMGR_LAUNCH_ID", "mine")
        patch.setattr(opening, "_starts", {})
        patch.setattr(claiming, "create_run", create_after_a_rival)
        assert open_run() == (rivals[0][0], 2)
    assert runs(root) == [rivals[0][0]]


def test_many_starts_at_once_under_one_name_share_one_run_or_say_why_not(root):
    def start(rank):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        return open_run()

    outcomes = run_ranks(8, start, store="none", environ={"RUNMGR_LAUNCH_ID": "mine"})
    opened = [outcome.value for outcome in outcomes if outcome.error is None]
    assert len(runs(root)) == 1
    assert {run_id for run_id, _ in opened} == set(runs(root))
    assert len({attempt for _, attempt in opened}) == len(opened) >= 1
    assert all(isinstance(outcome.error, RunError) for outcome in outcomes if outcome.error is not None)
