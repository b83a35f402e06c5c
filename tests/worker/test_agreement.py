"""Rank 0 acts, and every rank gets the result, the same error, or the name of who did not come."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from processes import run_ranks, values

from runmgr.errors import AgreementError, CheckpointNotFound, InvalidInput, RankFailed, RankTimeout
from runmgr.worker import agreement

HOST = socket.gethostname()
BOTH_STORES = pytest.mark.parametrize("store", ["agent", "group"])


def joined_by_all(timeout_s):
    """Join patiently, since a busy machine starts processes at different moments; then wait only `timeout_s` for others."""
    joined = agreement.connect(30)
    joined.agree("begin", lambda _: None)
    joined.timeout_s = timeout_s
    return joined


def faces(outcomes):
    """Return what an error looks like from each rank: its type and text."""
    return [(type(outcome.error), str(outcome.error)) for outcome in outcomes]


def the_one_error(outcomes, *, within_s=10.0):
    """Return the error that all ranks raised alike and in time."""
    assert all(outcome.signal is None for outcome in outcomes), outcomes
    assert len(set(faces(outcomes))) == 1, faces(outcomes)
    assert max(outcome.seconds for outcome in outcomes) < within_s
    error = outcomes[0].error
    assert error is not None, "nobody raised"
    assert [outcome.error.fields for outcome in outcomes] == [error.fields] * len(outcomes)
    return error


@BOTH_STORES
@pytest.mark.parametrize("world_size", [2, 4])
def test_rank_0_decides_with_the_answers_of_all_and_all_get_its_result(store, world_size):
    def ask(rank):
        joined = agreement.connect(30)
        first = joined.agree("add", sum, lambda: 10**rank)
        second = joined.agree("list", lambda answers: {"answers": answers, "by": os.getpid()}, lambda: [rank])
        return first, second["answers"], second["by"]

    results = values(run_ranks(world_size, ask, store=store))
    assert len({by for _, _, by in results}) == 1, "one process decided"
    expected = sum(10**rank for rank in range(world_size)), [[rank] for rank in range(world_size)]
    assert [(first, second) for first, second, _ in results] == [expected] * world_size


def test_alone_needs_no_store_and_gets_plain_data_as_several_ranks_would():
    joined = agreement.connect(1)
    assert joined.agree("list", lambda answers: {1: tuple(answers)}, lambda: 7) == {"1": [7]}


@BOTH_STORES
@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_on_one_rank_is_the_same_error_on_all_and_names_the_rank(store, failing):
    def fail(rank):
        def contribute():
            if rank == failing:
                raise OSError(28, "No space left on device", "/somewhere")

        agreement.connect(30).agree("count the beans", lambda _: None, contribute)

    error = the_one_error(run_ranks(4, fail, store=store))
    assert type(error) is RankFailed
    assert str(error) == (
        f"rank {failing} on {HOST} could not count the beans: OSError: [Errno 28] No space left on device: '/somewhere'"
    )
    assert (error.rank, error.host, error.error_type) == (failing, HOST, "OSError")


@BOTH_STORES
def test_an_error_of_ours_crosses_with_its_type_and_fields(store):
    def fail(_rank):
        def decide(_):
            raise CheckpointNotFound("there is no x.pth", path="/x.pth")

        agreement.connect(30).agree("look", decide)

    error = the_one_error(run_ranks(3, fail, store=store))
    assert type(error) is CheckpointNotFound
    assert error.fields == {"path": "/x.pth"}


def test_after_an_error_the_ranks_can_go_on_together():
    def fail_then_ask(rank):
        joined = agreement.connect(30)

        def contribute():
            if rank == 1:
                raise InvalidInput("no")

        with pytest.raises(InvalidInput):
            joined.agree("fail", lambda _: None, contribute)
        return joined.agree("add", sum, lambda: rank)

    assert values(run_ranks(3, fail_then_ask)) == [3, 3, 3]


def test_a_result_that_is_no_plain_data_fails_on_all():
    def fail(_rank):
        agreement.connect(5).agree("answer", lambda _: {1, 2})

    error = the_one_error(run_ranks(2, fail))
    assert "TypeError" in str(error)


@BOTH_STORES
def test_a_rank_that_never_comes_to_the_start_is_named_on_every_rank_that_came(store):
    def start(rank):
        if rank == 2:
            time.sleep(5)
            return None
        return agreement.connect(3).agree("start", lambda _: None)

    came = [outcome for outcome in run_ranks(4, start, store=store) if outcome.rank != 2]
    error = the_one_error(came)
    assert type(error) is RankTimeout
    assert error.ranks == [2]
    assert "rank 2 did not come to start within 3 s" in str(error)


@BOTH_STORES
def test_ranks_that_never_come_to_a_later_call_are_named_on_every_rank_that_came(store):
    def ask(rank):
        joined = joined_by_all(1)
        if rank in {1, 3}:
            time.sleep(2.5)
            return None
        return joined.agree("save", lambda _: None)

    outcomes = run_ranks(4, ask, store=store)
    error = the_one_error([outcomes[0], outcomes[2]])
    assert type(error) is RankTimeout
    assert error.ranks == [1, 3]
    assert "ranks 1, 3 did not come to save within 1 s" in str(error)


def test_rank_0_that_never_comes_is_named_too(monkeypatch):
    monkeypatch.setattr(agreement, "_GRACE_S", 0.3)

    def ask(rank):
        joined = joined_by_all(1)
        if rank == 0:
            time.sleep(2.5)
            return None
        return joined.agree("save", lambda _: None)

    error = the_one_error(run_ranks(3, ask)[1:])
    assert type(error) is RankTimeout
    assert error.ranks == [0]
    absent = the_one_error(run_ranks(3, lambda _: agreement.connect(0.5), absent=(0,)))
    assert type(absent) is RankTimeout
    assert absent.ranks == [0]


def test_rank_0_may_work_longer_than_others_may_take_to_come(monkeypatch):
    for name, seconds in {"_BEAT_S": 0.1, "_GRACE_S": 0.2, "_SILENCE_S": 1.5}.items():
        monkeypatch.setattr(agreement, name, seconds)

    def ask(_rank):
        return joined_by_all(0.5).agree("write much", lambda _: time.sleep(2) or "done")

    assert values(run_ranks(2, ask)) == ["done", "done"]


def test_rank_0_killed_at_work_is_noticed(monkeypatch):
    for name, seconds in {"_BEAT_S": 0.1, "_GRACE_S": 0.2, "_SILENCE_S": 1.5}.items():
        monkeypatch.setattr(agreement, name, seconds)

    def ask(_rank):
        def decide(_):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

        joined_by_all(0.5).agree("write", decide)

    killed, *others = run_ranks(3, ask)
    assert killed.signal == signal.SIGKILL
    error = the_one_error(others)
    assert type(error) is RankTimeout
    assert error.ranks == [0]


def test_the_loss_of_the_store_is_a_clear_error():
    def ask(rank):
        joined = agreement.connect(30)
        joined.agree("begin", lambda _: None)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        joined.agree("go on", lambda _: None)

    killed, other = run_ranks(2, ask, store="group")  # rank 0 hosts a group's store
    assert killed.signal == signal.SIGKILL
    assert type(other.error) is AgreementError
    assert f"rank 1 on {HOST} lost the store" in str(other.error)
    assert other.seconds < 10


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_answer_arrives_although_rank_0_exits_at_once_and_hosts_the_store(fails):
    def ask(_rank):
        def decide(_):
            time.sleep(0.5)  # the others now look only every 50 ms
            if fails:
                raise InvalidInput("no")
            return "yes"

        joined = agreement.connect(30)
        try:
            return joined.agree("end", decide)
        finally:
            agreement.forget(joined)

    for _ in range(2):
        outcomes = run_ranks(3, ask, store="group")
        if fails:
            assert type(the_one_error(outcomes)) is InvalidInput
        else:
            assert values(outcomes) == ["yes"] * 3


def test_what_an_earlier_attempt_left_in_the_store_is_never_believed():
    def attempts(rank):
        answers = []
        for attempt in (1, 2, 3):
            agreement.forget(agreement.shared())
            if rank == 0 and attempt > 1:
                time.sleep(0.5)  # the others come first and find the whole old session
            joined = agreement.connect(10)
            answers.append(joined.agree("count", lambda _, attempt=attempt: attempt))
            joined.agree("leave a second exchange behind", lambda _: "old")
        return answers

    assert values(run_ranks(3, attempts)) == [[1, 2, 3]] * 3


def test_a_dead_ranks_old_hello_is_not_taken_for_its_presence():
    def join(rank):
        store = agreement._agent_store(5)
        if rank == 0:
            store.set("runmgr/hello/1", "of-the-dead")
            store.set("ready", "1")
        else:
            store.get("ready")
            time.sleep(1)
        joined = agreement.connect(10)
        return joined.agree("list", list, lambda: rank), joined._session

    (answer, session), other = values(run_ranks(2, join))
    assert answer == [0, 1]
    assert other == (answer, session)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
    ],
    ids=" ".join,
)
def test_several_ranks_without_store_or_group_are_told_what_to_do(variables):
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        with pytest.raises(AgreementError, match=r"torchrun") as raised:
            agreement.connect(60)
    assert time.monotonic() - start < 10
    assert all(name in str(raised.value) for name in variables)


def test_agreeing_leaves_the_store_as_small_as_it_found_it():
    def ask(rank):
        joined = agreement.connect(10)
        joined.agree("begin", lambda _: None)
        store = agreement._agent_store(5)
        before = store.num_keys()
        for _ in range(50):
            joined.agree("go on", lambda _: None)
        joined.agree("end", lambda _: None)
        time.sleep(0.2)
        return store.num_keys() - before if rank == 0 else 0

    assert values(run_ranks(3, ask))[0] <= 3
