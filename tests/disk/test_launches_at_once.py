"""Many launches at one instant in one experiment, with locks that work, fail, lie, or never come free."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from syscalls import deny

import runmgr
import runmgr.start
from runmgr.disk import atomic, directory

LAUNCHES = 64
FORK = multiprocessing.get_context("fork")
HOUR_NS = 3600 * 10**9
LOCKS = {
    "flock works": None,
    "flock fails with ENOLCK": errno.ENOLCK,
    "flock fails with ENOSYS": errno.ENOSYS,
    "flock always succeeds": 0,
}


def _set_clock(offset_ns):
    """The clock is the one thing that cannot be had for real: each process reads its own, shifted and in whole seconds.

    So rivals want the same id, and only the claim keeps them apart.
    """
    true = time.time_ns
    time.time_ns = lambda: true() // 10**9 * 10**9 + offset_ns


def _note_when_locked(noted):
    """Note the moments at which this process came to hold the lock."""
    true = atomic.locked

    @contextmanager
    def locked(path, **options):
        with true(path, **options) as reason:
            noted.append(time.monotonic_ns())
            yield reason

    atomic.locked = locked


def _launches(number, root, flock_error, offset_ns, starts, ready, go, answers):
    """One process that starts `starts` runs, one after the other; what it saw goes into `answers`."""
    if flock_error is not None:
        deny("flock", error=flock_error)
    _set_clock(offset_ns)
    locked_at: list[int] = []
    _note_when_locked(locked_at)
    ready.release()
    go.wait()
    for _ in range(starts):
        before = time.monotonic_ns()
        with runmgr.start_run("crowd", ckpt_root_dir=root) as run:
            after = time.monotonic_ns()
            run.save({"net": torch.nn.Linear(1, 1)}, epoch=1)
        answers.put((run.run_id, before, after, locked_at[-1]))


@contextmanager
def _no_survivors(processes):
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _crowd(root, *, flock_error=None, clock=lambda number: 0, launches=LAUNCHES, starts=1):
    """Let `launches` processes go at once; returns (run id, before, after, locked at) of every start."""
    ready, go, answers = FORK.Semaphore(0), FORK.Event(), FORK.SimpleQueue()
    processes = [
        FORK.Process(target=_launches, args=(n, root, flock_error, clock(n), starts, ready, go, answers))
        for n in range(launches)
    ]
    with _no_survivors(processes):
        for process in processes:
            process.start()
        for _ in processes:
            assert ready.acquire(timeout=120)
        go.set()
        found = [answers.get() for _ in range(launches * starts)]
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
    return found


def _assert_later_starts_have_greater_ids(started):
    for one, _, after, _ in started:
        for other, before, _, _ in started:
            if before > after:
                assert other > one


def _directories(root):
    return sorted(name for name in os.listdir(root / "crowd") if name.startswith("RUN_"))


def _clocks_an_hour_apart(number):
    return (number % 3 - 1) * HOUR_NS


@pytest.mark.parametrize("lock", LOCKS)
def test_64_launches_at_once_get_64_directories(root, lock):
    started = _crowd(root, flock_error=LOCKS[lock], clock=_clocks_an_hour_apart)
    ids = [run_id for run_id, *_ in started]
    assert len(set(ids)) == LAUNCHES
    assert sorted(ids) == _directories(root)
    _assert_later_starts_have_greater_ids(started)
    if LOCKS[lock] is None:
        in_order_of_locks = [run_id for run_id, *_ in sorted(started, key=lambda start: start[3])]
        assert in_order_of_locks == sorted(ids)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_launch_after_another_has_a_greater_id_whatever_the_clocks_say(root, lock):
    def any_clock(number):
        return random.choice((-HOUR_NS, 0, HOUR_NS))

    started = _crowd(root, flock_error=LOCKS[lock], clock=any_clock, launches=8, starts=6)
    assert len(set(_directories(root))) == 48
    _assert_later_starts_have_greater_ids(started)
    (last,) = _crowd(root, flock_error=LOCKS[lock], clock=lambda number: -HOUR_NS, launches=1)
    assert runmgr.get_latest_run_id("crowd", root) == last[0] == _directories(root)[-1]


def test_a_lock_whose_holder_is_stopped_is_waited_for_only_so_long(root, monkeypatch):
    monkeypatch.setattr(atomic, "LOCK_TIMEOUT_S", 1.0)
    monkeypatch.setattr(atomic.locked.__wrapped__, "__kwdefaults__", {"timeout_s": 1.0})
    experiment = directory.Experiment(root, "crowd")
    experiment.lock_path.parent.mkdir(parents=True)
    holder = os.fork()
    if not holder:
        descriptor = os.open(experiment.lock_path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(holder, os.WUNTRACED)
    try:
        started = _crowd(root)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert len({run_id for run_id, *_ in started}) == LAUNCHES
    waits_s = [(after - before) / 1e9 for _, before, after, _ in started]
    assert min(waits_s) > 1.0, "each waited for the lock"
    assert max(waits_s) < 20.0, "and not for long"
    _assert_later_starts_have_greater_ids(started)
    run_dir = root / "crowd" / started[0][0]
    (log,) = run_dir.glob("log_*.txt")
    assert "was held by another process for more than 1 s; the run id was claimed by mkdir alone" in log.read_text()


def test_marks_of_ids_given_out_do_not_pile_up(root):
    _crowd(root, launches=16, starts=2)
    marks = os.listdir(root / "crowd" / ".runmgr" / "last_run_id")
    assert marks == [_directories(root)[-1]]
