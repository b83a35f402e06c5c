"""Meetings: all ranks are told of the same call, however differently fast they are."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from torch import nn

import runmgr
from tests.processes import run_ranks, values


def _stop_at_random_paces(rank, root, rounds):
    dice = random.Random(rank)
    stopped = []
    for round_number in range(rounds):
        late = random.Random(round_number).randrange(8)
        with runmgr.start_run("stop", ckpt_root_dir=root, resume="never") as run:
            for call in range(1, 1_000_000):
                if rank == late and call == 50:
                    asked = time.time()
                    os.kill(
                        os.getpid(),
                        random.Random(round_number).choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]),
                    )
                if run.should_stop():
                    stopped.append((call, time.time()))
                    assert run.should_stop()
                    break
                time.sleep(dice.choice([0, 0, 0.001, 0.004]))
        if rank == late:
            assert time.time() - asked < 60
    return stopped


def test_eight_ranks_stop_at_the_same_call_every_time(root):
    outcomes = values(run_ranks(8, _stop_at_random_paces, root, 6))
    for round_number in range(6):
        assert len({stopped[round_number][0] for stopped in outcomes}) == 1
    assert [info.status for info in runmgr.list_runs("stop", root)] == ["preempted"] * 6


def _fail_then_go_on(rank, root):
    model = nn.Linear(4, 4)
    with runmgr.start_run("fail", ckpt_root_dir=root) as run:
        run.save({"net": model}, epoch=1)
        if run._saver is not None:
            run._saver._shelf.publish = _refuse
        run.save({"net": model}, epoch=2, block=False)
        met = []
        for call in range(1, 100_000):
            try:
                if run.should_stop():
                    return [*met, call]
            except runmgr.RankFailed as error:
                met.append((call, "no room" in str(error)))
                if rank == 2:
                    os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.001)
    return None


def _refuse(_):
    raise OSError("no room")


def test_the_failure_of_a_background_save_reaches_all_at_the_same_call_and_training_can_go_on(root):
    first, *others = values(run_ranks(3, _fail_then_go_on, root))
    assert len(first) == 2
    assert first[0][1]
    assert others == [first, first]


def _until_the_end_of_the_job(rank, root):
    with runmgr.start_run("job", ckpt_root_dir=root) as run:
        for call in range(1, 100_000):
            if run.should_stop():
                return call
            time.sleep(0.001)
    return None


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_end_of_a_slurm_job_stops_all_ranks_shortly_before(root, ranks):
    end = time.time() + 8
    calls = values(run_ranks(ranks, _until_the_end_of_the_job, root, environ={"SLURM_JOB_END_TIME": str(int(end))}))
    assert time.time() < end + 3
    assert len(set(calls)) == 1
    assert calls[0] is not None
    (info,) = runmgr.list_runs("job", root)
    assert info.status == "preempted"
    assert "the job's time ends" in "".join(path.read_text() for path in info.path.glob("log_*.txt"))


def _ask_without_the_others(rank, root):
    with runmgr.start_run("gone", ckpt_root_dir=root, timeout_s=2) as run:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while not run.should_stop():
            if rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)


def test_a_rank_that_is_gone_is_named_instead_of_waited_for(root):
    first, _, third = run_ranks(3, _ask_without_the_others, root)
    assert isinstance(first.error, runmgr.RankTimeout)
    assert first.error.ranks == [1]
    assert isinstance(third.error, runmgr.RankTimeout)
