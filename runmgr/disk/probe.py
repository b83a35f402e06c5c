"""What the probes of a file system share: a place that is cleaned up whatever happens, rivals, and what they find."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runmgr.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREFIX = ".runmgr-doctor-"
Verdict = Literal["fine", "worse", "unsafe"]
CHILD_LIMIT_S = 20.0
_RACE_LIMIT_S = 2.0
ELSEWHERE = "put ckpt_root_dir on another file system"
WRONG_CLOCK_S = 2.0
NO_ORDER = "run ids are claimed by mkdir alone: unique, but no order among launches of the same moment"


class Finding(NamedTuple):
    """One answer: what was measured, what runmgr does there, and what to fix ("" when nothing is wrong)."""

    name: str
    verdict: Verdict
    measured: str
    consequence: str
    advice: str = ""
    figures: dict[str, Any] = {}  # noqa: RUF012  # never changed


class Mount(NamedTuple):
    """Where a path's file system comes from."""

    kind: str
    source: str
    options: tuple[str, ...]


@contextlib.contextmanager
def fresh_directory(root: Path, word: str = "") -> Iterator[Path]:
    """Have a new hidden directory in `root` while the block runs; it goes also when this process is killed.

    A child waits for this process to end, whatever ends it, and then removes the directory.
    """
    path = root / f"{PREFIX}{word}{os.urandom(6).hex()}"
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "does not exist"
        raise RunError(
            f"{root} {problem} on host {os.uname().nodename}; give the directory that experiments shall lie in"
        )
    guard, writing = _start_guard(path)
    try:
        try:
            os.mkdir(path)
        except OSError as error:
            raise RunError(
                f"nothing can be created in {root} on host {os.uname().nodename} ({error.strerror}), so no training could "
                f"start there; look at its owner, its mode and whether it is mounted read-only"
            ) from None
        yield path
    finally:
        remove_tree(path)
        _guards.discard(writing)
        os.close(writing)
        os.waitpid(guard, 0)


def remove_tree(path: Path) -> None:
    """Remove a directory that another host may still be putting files into."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            shutil.rmtree(path)
        if not os.path.lexists(path):
            return
        time.sleep(0.1)


_guards: set[int] = set()  # what a guard listens to; other children must not keep it open


def _start_guard(path: Path) -> tuple[int, int]:
    """Start what removes `path` when the descriptor that is returned with its pid is closed everywhere."""
    reading, writing = os.pipe()
    is_ready, ready = os.pipe()
    pid = _fork()
    if pid:
        for descriptor in (reading, ready):
            os.close(descriptor)
        os.read(is_ready, 1)
        os.close(is_ready)
        _guards.add(writing)
        return pid, writing
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1})
        null = os.open(os.devnull, os.O_RDWR)
        for number, descriptor in enumerate((null, null, null, os.dup(reading))):  # nobody waits for our output to end
            os.dup2(descriptor, number)
        os.write(ready, b"x")
        os.closerange(4, 1 << 16)
        os.read(3, 1)  # ends when the last holder of the other end does
        remove_tree(path)
    finally:
        os._exit(0)


def _fork() -> int:
    """Fork with Ctrl-C put off, in the child for good: Python drops what is raised in its hooks around a fork."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


class Child:
    """A forked process that does one thing; its answer is plain data."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._reading, writing = os.pipe()
        self._pid = _fork()
        if self._pid:
            os.close(writing)
            return
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for descriptor in (self._reading, *_guards):
                os.close(descriptor)
            _guards.clear()
            try:
                answer = [action(), None]
            except OSError as error:
                answer = [None, error.errno]
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)

    def result(self, limit_s: float = CHILD_LIMIT_S) -> Any:
        """Return what it answered, or raise its OSError; one that takes too long is killed, and that is ETIMEDOUT."""
        deadline, content = time.monotonic() + limit_s, b""
        try:
            while select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                part = os.read(self._reading, 1 << 16)
                content += part
                if not part:
                    break
        finally:
            os.close(self._reading)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        value, code = json.loads(content or f"[null, {errno.ETIMEDOUT}]")
        if code is not None:
            raise OSError(code, os.strerror(code))
        return value


def mount_of(path: Path) -> Mount:
    """Return the file system that holds `path`, as far as the kernel says (Linux)."""
    found, longest = Mount("unknown", "", ()), -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    whole = path.resolve()
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(_plain(before.split()[4]))
        if (whole == point or point in whole.parents) and len(str(point)) >= longest:  # a later one lies on top
            kind, source, *more = after.split()
            options = (*before.split()[5].split(","), *",".join(more).split(","))
            found, longest = Mount(kind, _plain(source), options), len(str(point))
    return found


def _plain(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def race(
    make: Callable[[str], None], names: list[str], limit_s: float = _RACE_LIMIT_S
) -> tuple[int, list[int], set[int]]:
    """Try to make all names; returns how many were tried, which were made, and how losers were told (errno)."""
    won, told, tried = [], set(), 0
    deadline = time.monotonic() + limit_s
    for index, name in enumerate(names):
        if time.monotonic() > deadline:
            break
        tried += 1
        try:
            make(name)
        except OSError as error:
            told.add(error.errno or 0)
        else:
            won.append(index)
    return tried, won, told


def judge_race(name: str, results: list[tuple[int, list[int], list[int]]], rivals: str) -> Finding:
    """Say whether each name that all rivals tried had one winner."""
    tried = min(count for count, *_ in results)
    winners = [sum(index in won for _, won, _ in results) for index in range(tried)]
    twice, nobody = sum(count > 1 for count in winners), winners.count(0)
    told = sorted({code for *_, codes in results for code in codes} - {errno.EEXIST})
    figures: dict[str, Any] = {
        "names": tried,
        "two_winners": twice,
        "no_winner": nobody,
        "other_errors": [os.strerror(code) for code in told],
    }
    said = f"{rivals}, {tried} names: {tried - twice - nobody} with one winner"
    if twice:
        return Finding(
            name, "unsafe", f"{said}, {twice} with several", "two launches can get one run directory", ELSEWHERE,
            figures,
        )  # fmt: skip
    if nobody:
        said += f", {nobody} with none (the next id is tried)"
    if told:
        said += f"; losers are told {', '.join(figures['other_errors'])}"
    return Finding(name, "fine", said, "run ids and attempts are claimed by it", figures=figures)


def try_lock(path: Path) -> bool:
    """Whether the lock file can be had at once, as `atomic.locked` asks for it; lets go again."""
    with locked(path) as is_ours:
        return is_ours


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file if it is free; yields whether it was."""
    import filelock

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield filelock.lock_descriptor(descriptor, blocking=False)
    finally:
        os.close(descriptor)
