"""Who may take a run over, and when: dead holders, live ones, restarts, rivals at the same instant."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from disk.holders import hold

from runmgr.disk import lease as leases
from runmgr.disk import record
from runmgr.disk.lease import Lease
from runmgr.errors import RunBusy


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def _frequent_heartbeat(monkeypatch):
    """A rival waits for the holder's next sign of life, which need not take 5 s."""
    monkeypatch.setattr(leases, "_HEARTBEAT_S", 0.5)


def begin(run, lease, **facts):
    return record.Attempt.begin(run, facts | lease.facts(), after=lease.after)


def test_a_live_writer_is_named_and_a_dead_one_replaced_at_once(run, monkeypatch):
    monkeypatch.setattr(record, "LEASE_S", 3600.0)  # nobody waits for that
    pid = hold(run)
    try:
        with pytest.raises(RunBusy, match=f"pid {pid} on host {record.this_host()}") as busy:
            Lease(run).acquire(takes_over=False)
        assert busy.value.age_s == 0
    finally:
        os.kill(pid, signal.SIGKILL)
    zombie = Lease(run)
    zombie.acquire(takes_over=False)  # nobody has waited for the dead process yet
    zombie.release()
    os.waitpid(pid, 0)


def test_a_restart_takes_over_a_live_writer_of_its_own_launch_at_once(run):
    pid = hold(run, launch="torchrun-1, slurm-7")
    try:
        lease = Lease(run)
        lease.acquire(takes_over=True, launch="torchrun-2, slurm-7")
        assert begin(run, lease).number == 2
        lease.release()
    finally:
        end(pid)


def test_a_restart_does_not_take_over_what_another_launch_resumed_meanwhile(run):
    pid = hold(run, launch="theirs")
    try:
        with pytest.raises(RunBusy, match=f"pid {pid} "):
            Lease(run).acquire(takes_over=True, launch="ours")
    finally:
        end(pid)


@pytest.mark.parametrize("takes_over", [True, False])
def test_a_rival_that_has_its_mark_but_no_attempt_yet_is_not_taken_for_its_dead_predecessor(run, takes_over):
    end(hold(run, launch="ours"))
    rival = Lease(run)
    rival.acquire(takes_over=False)
    try:
        with pytest.raises(RunBusy, match=f"pid {os.getpid()} on host {record.this_host()}, seen alive 0 s ago"):
            Lease(run).acquire(takes_over=takes_over, launch="ours")
        assert begin(run, rival).number == 2
    finally:
        rival.release()


def test_the_number_decides_between_two_that_both_judged_the_run_free(run):
    """As when both watched a silent holder for a whole lease, and one removes the mark that the other has just put there."""
    winner, loser = Lease(run), Lease(run)
    winner.acquire(takes_over=False)
    run.lease_path.unlink()
    loser.acquire(takes_over=False)
    assert begin(run, winner).number == 1
    with pytest.raises(RunBusy, match=f"pid {os.getpid()} "):
        begin(run, loser)
    loser.release()
    winner.release()


def test_a_refusal_by_the_file_system_that_nobody_gained_by_is_no_defeat(run, monkeypatch):
    refused = [FileExistsError, FileExistsError]
    true = record.atomic.create_bytes

    def create(path, content):
        if refused:
            raise refused.pop()
        true(path, content)

    monkeypatch.setattr(record.atomic, "create_bytes", create)
    assert record.Attempt.begin(run, {}, after=0).number == 1
    assert not refused


def test_a_live_writer_puts_a_lost_mark_back_and_a_superseded_one_does_not(run, monkeypatch):
    monkeypatch.setattr(leases, "_HEARTBEAT_S", 0.02)
    lease = Lease(run)
    lease.acquire(takes_over=False)
    begin(run, lease)
    try:
        for _ in range(3):
            run.lease_path.unlink()
            wait_for(run.lease_path.exists)
        run.lease_path.unlink()
        run.lease_path.mkdir()  # the server is away
        time.sleep(0.2)
        run.lease_path.rmdir()
        wait_for(run.lease_path.exists)
        record.Attempt.begin(run, {})
        run.lease_path.unlink()
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("filelock")])
        assert not run.lease_path.exists()
    finally:
        lease.release()


def test_whether_a_run_is_live_is_seen_and_not_reckoned_from_clocks(run, monkeypatch):
    monkeypatch.setattr(record, "LEASE_S", 1.0)
    monkeypatch.setattr(leases, "_HEARTBEAT_S", 0.2)
    assert not leases.is_live(run)
    record.RunRecord(run, {}).update(status="running")
    assert not leases.is_live(run)
    pid = hold(run)
    try:
        now = time.time
        for offset_s in (-3600, 3600):
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda offset_s=offset_s: now() + offset_s)
                assert leases.is_live(run)
        os.kill(pid, signal.SIGSTOP)
        assert not leases.is_live(run), "silent for a lease"
    finally:
        end(pid)
    monkeypatch.setattr(record, "LEASE_S", 3600.0)
    assert not leases.is_live(run), "dead for certain"


def test_the_same_name_in_another_process_namespace_is_another_host(run, monkeypatch):
    end(hold(run))
    record_path = run.attempt_path(1)
    assert record.is_dead_here(record.read_json(record_path))
    monkeypatch.setattr(record, "_pid_namespace", lambda: 1)
    assert not record.is_dead_here(record.read_json(record_path))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
