"""The lease: the mark of a run's live writer, which holds rivals off. What keeps data safe is the order of attempts."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, record

if TYPE_CHECKING:
    import filelock

    from runmgr.disk.directory import RunDirectory

_HEARTBEAT_S = 5.0
_POLL_S = 0.05
_NAMING_S = 1.0


class Lease:
    """The mark of the run's live writer: refreshed every 5 s, expired after 30 s, across hosts.

    `after` is the newest attempt that there was when this process began to look; its own must be the next.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.after = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._lease = self._new()

    def acquire(self, *, takes_over: bool, launch: str | None = None) -> None:
        """Become the live writer, or raise RunBusy as soon as the present one shows that it is alive.

        A holder that is provably dead on this host is replaced at once, and with `takes_over` (a restart of the same
        launch) one whose attempt was begun by `launch` too. Anybody else's mark counts until it was unchanged for a
        whole lease of our own clock.
        """
        import filelock

        _make_ready(self.run)
        self.after = max(record.attempt_numbers(self.run), default=0)
        watch = _Watch(self.run, self._lease)
        if takes_over and watch.is_of_launch(launch):
            watch.remove_mark()
        try:
            self._lease.acquire(
                timeout=record.LEASE_S + 2 * _HEARTBEAT_S, poll_interval=_POLL_S, cancel_check=watch.is_refused
            )
        except filelock.Timeout:
            raise record.busy(self.run, watch.holder(), watch.age_s()) from None
        if not self.run.attempts_path.is_dir():  # moved away in this instant, and filelock made its directory anew
            self.release()
            remove_husk(self.run)
            raise record.gone(self.run)

    def facts(self) -> dict[str, Any]:
        """Return what the holder's attempt says of its mark, so that others know whose it is."""
        return {"mark": _mark(self._lease)}

    def release(self) -> None:
        """Give the run free; harmless when it was lost meanwhile."""
        with self._lock:
            self._released.set()
            self._lease.release()

    def _new(self) -> filelock.SoftFileLease:
        import filelock

        return filelock.SoftFileLease(
            self.run.lease_path,
            lease_duration=record.LEASE_S,
            heartbeat_interval=_HEARTBEAT_S,
            thread_local=False,
            on_compromise=lambda _: self._regain(),
        )

    def _regain(self) -> None:
        """Put the mark back: the file server was away for long, or a rival that misjudged it took it and gave up.

        Runs in the thread that refreshed the mark. A writer that was superseded, or whose run was moved to the trash,
        stays without one.
        """
        import filelock

        while True:
            with self._lock, suppress(OSError, filelock.Timeout):
                if self._released.is_set() or max(record.attempt_numbers(self.run), default=0) > self.after + 1:
                    return
                if not self.run.attempts_path.is_dir():
                    return
                with suppress(OSError):
                    self._lease.release()
                self._lease = self._new()
                self._lease.acquire(timeout=0)
                return
            if self._released.wait(_HEARTBEAT_S):
                return


def _make_ready(run: RunDirectory) -> None:
    """Make the directories that a run of another program lacks; raises RunNotFound for what is no run any more.

    In a run of our own nothing is made: it might be moved away in this instant.
    """
    needed = {path.name: path for path in (run.objects_path, run.attempts_path)}
    with record.told_if_gone(run):
        there = set(os.listdir(run.private_path)) if run.private_path.is_dir() else set()
        if not record.is_there(run):
            remove_husk(run)
            raise record.gone(run)
        if not there:
            run.private_path.mkdir(exist_ok=True)
        for name in needed.keys() - there:
            needed[name].mkdir(exist_ok=True)


def remove_husk(run: RunDirectory) -> None:
    """Remove what filelock makes of a run's path when it looks for the mark of one that was just moved away."""
    with suppress(OSError):
        if not record.is_there(run):
            atomic.remove(run.lease_path)
            with suppress(FileNotFoundError):
                run.private_path.rmdir()
            run.path.rmdir()


def claim_without_a_byte(run: RunDirectory) -> int:
    """Take the next attempt's number where the disk is too full for a mark; raises RunBusy if somebody is alive in it.

    Nobody else can begin to train there either, for want of a mark.
    """
    import filelock

    number = max(record.attempt_numbers(run), default=0) + 1
    watch = _Watch(run, filelock.SoftFileLease(run.lease_path, lease_duration=record.LEASE_S, thread_local=False))
    while watch.has_mark() and not watch.is_dead():
        if watch.shows_life():
            raise record.busy(run, watch.holder(), watch.age_s())
        time.sleep(_POLL_S)
    try:
        os.close(os.open(run.attempt_path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        raise record.busy(run, record.holder_of(run), 0.0) from None
    return number


def is_live(run: RunDirectory) -> bool:
    """Whether somebody trains in `run` right now; looks at its mark for up to one lease, since two clocks may differ."""
    import filelock

    if (record.read_json(run.record_path) or {}).get("status") != "running":
        return False
    watch = _Watch(run, filelock.SoftFileLease(run.lease_path, lease_duration=record.LEASE_S, thread_local=False))
    while watch.has_mark() and not watch.is_dead():
        if watch.shows_life():
            return True
        time.sleep(_POLL_S)
    return False


class _Watch:
    """What a contender sees of the present holder's mark, timed by its own clock alone."""

    def __init__(self, run: RunDirectory, lease: filelock.SoftFileLease) -> None:
        self._run = run
        self._lease = lease
        self._newest = record.newest_record(run)
        self._first, self._start, self._changed = self._stamp(), time.monotonic(), False

    def shows_life(self) -> bool:
        """Whether the mark was refreshed since."""
        self._changed = self._changed or self._stamp() not in {self._first, None}
        return self._changed

    def has_mark(self) -> bool:
        """Whether there is a mark now."""
        return self._stamp() is not None

    def is_dead(self) -> bool:
        """Whether the holder is gone for certain, or was silent for a whole lease of our clock."""
        if time.monotonic() - self._start > record.LEASE_S:
            return True
        if not record.is_dead_here(self._newest):
            return False
        if self._lease.owner is None:  # left empty by a power cut; one that has just come names itself at once
            return time.monotonic() - self._start > _NAMING_S
        return self._is_of_newest()

    def is_refused(self) -> bool:
        """Whether the holder shows life; the mark of a dead one is removed, and can be taken a moment later.

        filelock does that itself for most, but not for zombies, empty marks, and where two names cannot be swapped.
        """
        if self.shows_life():
            return True
        if self.is_dead():
            self.remove_mark()
        return False

    def is_of_launch(self, launch: str | None) -> bool:
        """Whether the mark is that of the newest attempt, and `launch` began that attempt too."""
        names = {name for name in (launch or "").split(", ") if name}
        return self._is_of_newest() and not names.isdisjoint(str(self._newest.get("launch")).split(", "))

    def remove_mark(self) -> None:
        """Remove the mark. Should a rival have put its own there in this instant, the next number decides between us."""
        atomic.remove(self._run.lease_path)

    def holder(self) -> str:
        """Name the process that the mark names, which one that has just come is still writing."""
        deadline = time.monotonic() + _NAMING_S
        while (owner := self._lease.owner) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if owner is None or self._is_of_newest():
            return record.holder_of(self._run)
        return f"pid {owner.pid} on host {owner.hostname.partition('?')[0]}"

    def age_s(self) -> float:
        """Return how long ago the holder was seen alive; as far as we saw."""
        return 0.0 if self._changed else time.monotonic() - self._start

    def _is_of_newest(self) -> bool:
        return self._newest.get("mark") is not None and self._newest.get("mark") == _mark(self._lease)

    def _stamp(self) -> int | None:
        try:
            return self._run.lease_path.stat().st_mtime_ns
        except OSError:
            return None


def _mark(lease: filelock.SoftFileLease) -> str | None:
    """Return which process the mark on disk names, the same for as long as it lives."""
    owner = lease.owner
    return None if owner is None else f"{owner.hostname} {owner.pid} {owner.start}"
