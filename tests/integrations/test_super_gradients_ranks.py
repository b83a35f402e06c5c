"""Rank 0 acts for all: before and after `init_process_group`, with its errors on every rank."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
import torch
from processes import run_ranks, values

from runmgr.errors import InvalidInput, RankFailed, RankTimeout
from runmgr.integrations.super_gradients import (
    broadcast_from_master,
    execute_and_distribute_from_master,
    get_world_size,
    is_distributed,
    is_main_process,
    multi_process_safe,
    wait_for_the_master,
)
from runmgr.worker import agreement

BOTH_STORES = pytest.mark.parametrize("store", ["agent", "group"])


@BOTH_STORES
def test_rank_0_alone_calls_and_all_get_what_it_returned(store):
    @execute_and_distribute_from_master
    def compute(factor, *, offset):
        return {"tensor": torch.arange(3) * factor, 7: (float("inf"), offset, None), "pid": os.getpid()}

    def ask(rank):
        found = compute(2, offset="x")
        return found["tensor"].tolist(), found[7], found["pid"], broadcast_from_master(rank)

    found = values(run_ranks(3, ask, store=store))
    assert len(set(map(repr, found))) == 1
    assert found[0][:2] == ([0, 2, 4], (float("inf"), "x", None))
    assert found[0][3] == 0


def test_alone_the_same_rules_hold():
    assert broadcast_from_master((1, "a")) == (1, "a")
    with pytest.raises(InvalidInput, match="a type that holds"):
        broadcast_from_master(int)
    assert (is_main_process(), is_distributed(), get_world_size()) == (True, False, 1)


def test_who_was_alone_when_it_first_asked_is_not_taken_for_alone_once_there_is_a_group():
    assert broadcast_from_master("alone") == "alone"
    assert values(run_ranks(2, broadcast_from_master, store="group")) == [0, 0]


def test_what_does_not_travel_is_the_same_error_on_all():
    outcomes = run_ranks(2, lambda _: broadcast_from_master(lambda: 1))
    assert [type(outcome.error) for outcome in outcomes] == [InvalidInput] * 2
    assert str(outcomes[0].error) == str(outcomes[1].error)


@BOTH_STORES
def test_a_function_that_is_safe_runs_once_and_nobody_waits(store):
    @multi_process_safe
    def act():
        return os.getpid()

    def call(rank):
        if rank == 1:
            time.sleep(0.1)
        return act(), is_main_process(), is_distributed(), get_world_size()

    (first, *_), *others = values(run_ranks(3, call, store=store))
    assert isinstance(first, int)
    assert others == [(None, False, True, 3)] * 2


@BOTH_STORES
def test_the_others_come_after_rank_0_however_long_it_takes(store, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "_BEAT_S", 0.1)
    monkeypatch.setattr(agreement, "_GRACE_S", 0.2)
    monkeypatch.setattr(agreement, "_SILENCE_S", 1.0)

    def enter(rank):
        agreement.connect(2)
        with wait_for_the_master(rank):
            if rank == 0:
                time.sleep(5)
                (tmp_path / "made").touch()
            return (tmp_path / "made").exists()

    assert values(run_ranks(3, enter, store=store)) == [True] * 3


def test_an_error_of_rank_0_is_everybodys_and_nobody_else_enters(tmp_path):
    def enter(rank):
        with wait_for_the_master():
            (tmp_path / str(rank)).touch()
            raise ValueError("no such data")

    outcomes = run_ranks(3, enter)
    assert {(type(outcome.error), str(outcome.error)) for outcome in outcomes} == {
        (
            RankFailed,
            f"rank 0 on {socket.gethostname()} could not do what the others wait for: ValueError: no such data",
        )
    }
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert max(outcome.seconds for outcome in outcomes) < 10


def test_an_interrupted_rank_0_lets_nobody_wait():
    def enter(rank):
        with wait_for_the_master():
            raise KeyboardInterrupt

    outcomes = run_ranks(2, enter)
    assert [type(outcome.error) for outcome in outcomes] == [KeyboardInterrupt, RankFailed]


def test_a_rank_that_does_not_come_is_named():
    def call(rank):
        agreement.connect(1)
        return "gone" if rank == 1 else broadcast_from_master(1)

    outcomes = run_ranks(3, call)
    assert outcomes[1].value == "gone"
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome.error, RankTimeout)
        assert outcome.error.ranks == [1]


def test_rank_0_may_end_at_once_although_the_store_is_its_own():
    @execute_and_distribute_from_master
    def work():
        time.sleep(0.5)  # the others now look only every 50 ms
        return "last word"

    def end(rank):
        found = work()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    first, *others = run_ranks(4, end, store="group")
    assert first.signal == signal.SIGKILL
    assert values(others) == ["last word"] * 3
