"""Sees the other ranks of this host die: the kernel says so at once, also of one that SIGKILL left no time to speak.

A thread sleeps in `poll` on a pidfd of each; nothing is exchanged and no device is asked. Two ranks a host do this, so
that one of them is left when the other dies.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from runmgr import ranks as environment
from runmgr.disk import failures, record
from runmgr.worker import memory

if TYPE_CHECKING:
    from runmgr.disk.directory import RunDirectory
    from runmgr.ranks import Ranks

_WATCHERS_A_HOST = 2
_TRIES, _PAUSE_MS = 20, 500
_JOIN_S = 1.0
_TORN_DOWN = ("SIGTERM", "SIGINT", "SIGHUP")
_ORDERLY = {0, *(128 + signal.Signals[name] for name in _TORN_DOWN)}


class _Sibling(NamedTuple):
    rank: int
    local_rank: int
    pid: int


class Siblings:
    """Watches from its creation to `close()`; `gone` holds the ranks that were seen to end, and how (None: unknown)."""

    def __init__(self, run: RunDirectory, attempt: int, ranks: Ranks) -> None:
        self.gone: dict[int, str | None] = {}
        self._run, self._attempt, self._ranks = run, attempt, ranks
        self._kills = memory.kills()
        self._stop: int | None = None
        if ranks.world_size == 1 or ranks.local_rank >= _WATCHERS_A_HOST or not hasattr(os, "pidfd_open"):
            return
        reading, writing = os.pipe()
        self._thread = threading.Thread(target=self._watch, args=(reading,), name="runmgr-siblings", daemon=True)
        try:
            self._thread.start()
            self._stop = writing
        except RuntimeError:  # no thread can be had; ranks that die then only leave what they can
            os.close(reading)
            os.close(writing)

    def close(self) -> None:
        """Stop watching."""
        if self._stop is None:
            return
        with suppress(BrokenPipeError):  # nobody was left to watch
            os.write(self._stop, b".")  # closing would not do: forked children hold this end too
        self._thread.join(_JOIN_S)
        os.close(self._stop)
        self._stop = None

    def _watch(self, reading: int) -> None:
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        watched: dict[int, _Sibling] = {}
        try:
            for sibling in self._others(poll):
                try:
                    descriptor = os.pidfd_open(sibling.pid)
                except ProcessLookupError:
                    self.gone[sibling.rank] = None
                    continue
                except OSError:  # a kernel or a sandbox that does not allow it
                    return
                watched[descriptor] = sibling
                poll.register(descriptor, select.POLLIN)
            while watched:
                for descriptor, _ in poll.poll():
                    if descriptor == reading:
                        return
                    poll.unregister(descriptor)
                    os.close(descriptor)
                    self._note(watched.pop(descriptor))
        finally:
            for descriptor in (reading, *watched):
                os.close(descriptor)

    def _others(self, poll: select.poll) -> list[_Sibling]:
        """Return the other ranks of this host that this process can see; rank 0 wrote down all of them."""
        for _ in range(_TRIES):
            content = record.look_at_json(self._run.attempt_path(self._attempt))
            if content:
                break
            if poll.poll(_PAUSE_MS):  # a lagging view of the file; or the end
                return []
        pids_here = (content.get("pids") or {}).get(self._ranks.host) or []
        for host in content.get("hosts") or []:
            pids = dict(zip(host["ranks"], pids_here, strict=False))
            if host["host"] == self._ranks.host and pids.get(self._ranks.rank) == os.getpid():
                ranks = sorted(pids)
                return [
                    _Sibling(rank, ranks.index(rank), pid)
                    for rank, pid in pids.items()
                    if pid is not None and rank != self._ranks.rank
                ]
        return []

    def _note(self, sibling: _Sibling) -> None:
        """Remember how a rank ended; speak for it if that was a death and it said nothing itself."""
        status = _status_of(sibling.pid)
        number = status & 0x7F if status is not None else 0
        how = None if status is None else _signal_name(number) if number else f"exit status {status >> 8}"
        self.gone[sibling.rank] = how
        told = _torchrun_error(sibling.local_rank)
        if told is None and (how is None or how in _TORN_DOWN or (not number and (status or 0) >> 8 in _ORDERLY)):
            return
        error = told or {"type": None, "message": f"killed by {how}" if number else f"ended with {how} and no report"}
        if how == "SIGKILL" and memory.kills() > self._kills:
            error["message"] += "; the kernel killed a process of this control group because memory ran out"
        report = {
            "format": record.FORMAT, "attempt": self._attempt, "rank": sibling.rank, "local_rank": sibling.local_rank,
            "host": self._ranks.host, "pid": sibling.pid, "time": record.now_text(), "is_consequence": False,
            "error": {"type": error["type"], "message": error["message"]}, "traceback": error.get("traceback", []),
            "seen_by": self._ranks.rank,
        }  # fmt: skip
        with suppress(OSError):  # a full disk: `gone` still goes into this rank's own report
            failures.leave(self._run, report)


def _status_of(pid: int) -> int | None:
    """Return a dead process's wait status while nobody has asked for it yet; the launcher soon will."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[-1]) if fields[0] in {"Z", "X"} else None
    except (OSError, ValueError, IndexError):
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _torchrun_error(local_rank: int) -> dict[str, Any] | None:
    """Return what a rank that torch's `record` decorates has told its agent."""
    path = environment.torchrun_error_file(local_rank)
    message = record.look_at_json(path).get("message") if path is not None else None
    if not isinstance(message, dict):
        return None
    trace = str((message.get("extraInfo") or {}).get("py_callstack", ""))
    return {"type": None, "message": str(message.get("message")), "traceback": trace.splitlines()}
