"""What a file system does between hosts. They speak through files in the directory that is probed, and nothing else.

Rank 0 makes a hidden directory, the others find it by listing, say hello, and are answered by their own nonce. Then one
rank of each other host follows a fixed list of steps: rank 0 puts a file, they see it and put one in answer. How long that
takes, there and back, is the lag; nobody's clock is compared with another's, but where that is the question.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from runmgr.disk import atomic
from runmgr.disk.probe import (
    ELSEWHERE,
    NO_ORDER,
    PREFIX,
    WRONG_CLOCK_S,
    Finding,
    fresh_directory,
    judge_race,
    locked,
    race,
    try_lock,
)
from runmgr.errors import NotShared, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from runmgr.ranks import Ranks

SEEN_LIMIT_S = 60.0  # as long as a start waits for a host to see the run directory
_STEP_LIMIT_S = 45.0
_FOLLOWER_LIMIT_S = 300.0
_GOODBYE_LIMIT_S = 10.0
_ROUNDS, _RACES = 5, 100
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.1
_LAGS = {  # what a lag means, what helps, and from how many seconds on that is needed
    "new name": (
        "a start waits that long for its hosts, and up to 60 s",
        "shorten the clients' caching (acdirmax)",
        5.0,
    ),
    "late name": (
        "nothing waits for it: what decides is created exclusively or listed, which asks the server",
        "shorten the clients' caching (NFS: lookupcache=positive; FUSE: negative_timeout)",
        _STEP_LIMIT_S,
    ),
    "replaced file": (
        "nothing is decided by reading a file again; `runmgr show` on another host may be that much behind",
        "shorten the clients' caching (acregmax)",
        _STEP_LIMIT_S,
    ),
}
_GONE = {errno.ENOENT, errno.ESTALE, errno.ENOTDIR}


class Peer(NamedTuple):
    """The rank that speaks for another host."""

    rank: int
    host: str


class Board:
    """The directory in which the hosts leave each other notes; a note appears whole or not at all."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._rank = rank

    def put(self, name: str, value: Any = None) -> None:
        """Leave a note."""
        with self.there():
            atomic.write_derived_json(self.path / name, value)

    def names(self) -> set[str]:
        """List the notes; making a name here first lets this host's cache go."""
        own = self.path / f".look-{self._rank}"
        with self.there():
            with contextlib.suppress(FileExistsError, PermissionError):
                own.mkdir()
            with contextlib.suppress(FileNotFoundError):
                own.rmdir()
            return set(os.listdir(self.path))

    def read(self, name: str) -> Any:
        """Read a note that is listed; its content may lag behind its name."""
        for pause_s in pauses(_STEP_LIMIT_S):
            with contextlib.suppress(OSError, ValueError):
                return json.loads((self.path / name).read_bytes())
            self.names()  # raises when all of it is gone
            time.sleep(pause_s)
        raise RunError(f"{self.path / name} is listed but could not be read for {_STEP_LIMIT_S:g} s")

    def wait(self, name: str, limit_s: float) -> Any:
        """Wait for a note and read it."""
        for pause_s in pauses(limit_s):
            if name in self.names():
                return self.read(name)
            time.sleep(pause_s)
        raise RunError(f"rank 0 did not come to {name!r} in {self.path} within {limit_s:g} s; look at its own message")

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Turn what the file system says of a directory that is gone into an error that says why."""
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE:
                raise
            raise RunError(f"rank 0 ended early: {self.path} is gone; look at its own message") from None


def pauses(limit_s: float) -> Iterator[float]:
    """Yield ever longer pauses until the time is over."""
    deadline, pause_s = time.monotonic() + limit_s, _FIRST_PAUSE_S
    while True:
        yield pause_s
        if time.monotonic() > deadline:
            return
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)


# Every rank but 0


def follow(root: Path, word: str, ranks: Ranks, *, limit_s: float = SEEN_LIMIT_S) -> int:
    """Take part for this rank; returns the status that rank 0 came to, and 0 at once where another speaks for the host."""
    board, peers = _find(root, word, ranks, limit_s)
    if ranks.rank not in peers:
        return 0
    for step, act in _STEPS.items():
        value = board.wait(step, _STEP_LIMIT_S + _FOLLOWER_LIMIT_S)
        with board.there():
            act(board, value, functools.partial(board.put, f"{step}.{ranks.rank}"))
    status = board.wait("end", _FOLLOWER_LIMIT_S)
    board.put(f"bye.{ranks.rank}")
    return int(status)


def _find(root: Path, word: str, ranks: Ranks, limit_s: float) -> tuple[Board, list[int]]:
    """Say hello in every directory that could be rank 0's, until one answers with this process's own nonce."""
    nonce, greeted = os.urandom(8).hex(), set()
    hello = {"host": ranks.host, "local_rank": ranks.local_rank, "nonce": nonce}
    for pause_s in pauses(limit_s):
        try:
            found = [name for name in os.listdir(root) if name.startswith(PREFIX + word)]
        except OSError as error:
            raise _not_seen(root, ranks, f"{error.strerror}") from None
        for name in found:
            board = Board(root / name, ranks.rank)
            with contextlib.suppress(OSError, RunError):  # one that is going away is not the one
                if name not in greeted:
                    board.put(f"hello.{ranks.rank}", hello)
                    greeted.add(name)
                plan = board.read("plan") if "plan" in board.names() else {"nonces": {}}
                if plan["nonces"].get(str(ranks.rank)) == nonce:
                    return board, plan["peers"]
        time.sleep(pause_s)
    raise _not_seen(root, ranks, f"nothing that rank 0 made there was seen for {limit_s:g} s")


def _not_seen(root: Path, ranks: Ranks, found: str) -> NotShared:
    return NotShared(
        f"host {ranks.host} (rank {ranks.rank}) does not share {root} with rank 0: {found}. All hosts of a launch need one "
        f"shared file system, mounted in the same place.",
        host=ranks.host,
        path=str(root),
    )


def _see_name(_board: Board, _value: Any, answer: Callable[[Any], None]) -> None:
    answer({"clock": time.time()})


def _see_late_name(board: Board, _value: Any, answer: Callable[[Any], None]) -> None:
    """Look a name up before it is there, then until it is; nothing else happens in its directory."""
    path = board.path / "quiet" / "late"
    missing = not path.exists()
    board.put(f"ready-late.{board._rank}", missing)  # noqa: SLF001
    for _ in pauses(_STEP_LIMIT_S):
        if path.exists():
            break
        time.sleep(_FIRST_PAUSE_S)
    answer(path.exists())


def _see_replaced(board: Board, _value: Any, answer: Callable[[Any], None]) -> None:
    """Read a file and hold it open, then read by name until it is another one."""
    path = board.path / "quiet" / "text"
    with path.open("rb", buffering=0) as held:
        before = now = held.read()
        board.put(f"ready-text.{board._rank}")  # noqa: SLF001
        for _ in pauses(_STEP_LIMIT_S):
            with contextlib.suppress(OSError):  # GlusterFS may say ESTALE at the moment of the exchange
                now = path.read_bytes()
            if now != before:
                break
            time.sleep(_FIRST_PAUSE_S)
        answer(now != before)


def _try_the_lock(board: Board, _value: Any, answer: Callable[[Any], None]) -> None:
    try:
        answer({"got": try_lock(board.path / "lock")})
    except OSError as error:
        answer({"error": error.strerror})


def _race(board: Board, _value: Any, answer: Callable[[Any], None]) -> None:
    answer(_run_race(board))


def _run_race(board: Board) -> list[Any]:
    names = [str(board.path / f"race-{index:04d}") for index in range(_RACES)]
    tried, won, told = race(os.mkdir, names, 5.0)
    return [tried, won, sorted(told)]


_STEPS: dict[str, Callable[[Board, Any, Callable[[Any], None]], None]] = {
    **{f"name-{count}": _see_name for count in range(_ROUNDS)},
    "late-name": _see_late_name,
    "replaced": _see_replaced,
    "locked": _try_the_lock,
    "race": _race,
}


# Rank 0


class Lead:
    """Rank 0's side. `findings` grow; `finish` lets the others go."""

    def __init__(self, board: Board, ranks: Ranks, limit_s: float) -> None:
        self._board = board
        self._ranks = ranks
        self.findings: list[Finding] = []
        self.peers: list[Peer] = []
        self._meet(limit_s)
        if self.peers:
            self._see_names()
            (board.path / "quiet").mkdir()
            (board.path / "quiet" / "text").write_bytes(b"old")
            self._see("late name", "late-name", "late", "a file that was looked up before it was there")
            self._see("replaced file", "replaced", "text", "a file that was held open and replaced")
            self._lock()
            self._race()

    def finish(self, status: int) -> None:
        """Tell the others the status to end with, and wait a little until they have heard."""
        self._board.put("end", status)
        self._collect("bye", _GOODBYE_LIMIT_S)

    def _meet(self, limit_s: float) -> None:
        expected = {f"hello.{rank}" for rank in range(1, self._ranks.world_size)}
        for pause_s in pauses(limit_s):
            here = expected & self._board.names()
            if here == expected:
                break
            time.sleep(pause_s)
        hellos = {int(name.partition(".")[2]): self._board.read(name) for name in here}
        self.peers = [
            Peer(rank, hello["host"])
            for rank, hello in sorted(hellos.items())
            if hello["local_rank"] == 0 and hello["host"] != self._ranks.host
        ]
        nonces = {rank: hello["nonce"] for rank, hello in hellos.items()}
        self._board.put("plan", {"nonces": nonces, "peers": [peer.rank for peer in self.peers]})
        missing = sorted(int(name.partition(".")[2]) for name in expected - here)
        hosts = [self._ranks.host, *(peer.host for peer in self.peers)]
        figures = {"hosts": hosts, "missing_ranks": missing}
        said = f"{len(hosts)} hosts see it: {', '.join(hosts)}"
        if missing:
            self.findings.append(
                Finding(
                    "shared", "unsafe",
                    f"ranks {', '.join(map(str, missing))} were not seen for {limit_s:g} s; {said}",
                    "start_run raises NotShared on every rank, naming the host, and leaves nothing",
                    "mount one file system in the same place on all hosts; the ranks that cannot see it name their hosts",
                    figures,
                )
            )  # fmt: skip
        else:
            self.findings.append(
                Finding("shared", "fine", said, "all hosts write into one run directory", figures=figures)
            )

    def _collect(self, step: str, limit_s: float = _STEP_LIMIT_S) -> dict[Peer, tuple[float, float, Any]]:
        """Wait for the peers' answers; returns when each was seen, by this process's two clocks, and what it says."""
        start, seen = time.monotonic(), {}
        for pause_s in pauses(limit_s):
            names = self._board.names()
            for peer in self.peers:
                if peer not in seen and f"{step}.{peer.rank}" in names:
                    seen[peer] = (time.monotonic() - start, time.time())
            if len(seen) == len(self.peers):
                break
            time.sleep(min(pause_s, 0.01))
        return {peer: (*when, self._board.read(f"{step}.{peer.rank}")) for peer, when in seen.items()}

    def _see_names(self) -> None:
        took: dict[Peer, list[float]] = {peer: [] for peer in self.peers}
        clocks: dict[Peer, tuple[float, float]] = {}
        for count in range(_ROUNDS):
            asked = time.time()
            self._board.put(f"name-{count}")
            for peer, (seconds, heard, answer) in self._collect(f"name-{count}").items():
                took[peer].append(seconds)
                half = (heard - asked) / 2
                if peer not in clocks or half < clocks[peer][1]:
                    clocks[peer] = (answer["clock"] - asked - half, half)
        lags = {peer: statistics.median(values) if values else _STEP_LIMIT_S for peer, values in took.items()}
        self._answer_s = max(lags.values())
        self._add_lag("new name", lags, "a new file, listed,")
        said = ", ".join(f"{peer.host} {offset:+.3f} s (±{half:.2g})" for peer, (offset, half) in clocks.items())
        wrong = [peer.host for peer, (offset, half) in clocks.items() if abs(offset) - half > WRONG_CLOCK_S]
        text = "nothing is decided by comparing clocks; run ids and logs carry each host's own time"
        figures = {peer.host: {"offset_s": offset, "uncertainty_s": half} for peer, (offset, half) in clocks.items()}
        self.findings.append(
            Finding("clocks", "worse", said, text, f"set the clock of {', '.join(wrong)} by NTP (chrony)", figures)
            if wrong
            else Finding("clocks", "fine", said, text, figures=figures)
        )

    def _see(self, name: str, step: str, path: str, what: str) -> None:
        self._board.put(step)
        self._collect(f"ready-{path}")
        self._board.put(f"quiet/{path}", "new")
        answers = self._collect(step, _STEP_LIMIT_S + 10.0)
        lags = {
            peer: answers[peer][0] if peer in answers and answers[peer][2] else _STEP_LIMIT_S for peer in self.peers
        }
        self._add_lag(name, lags, what)

    def _add_lag(self, name: str, lags: dict[Peer, float], what: str) -> None:
        said = f"{what} was seen and answered after " + ", ".join(
            f"{s:.3g} s ({peer.host})" for peer, s in lags.items()
        )
        figures = {peer.host: {"there_and_back_s": seconds} for peer, seconds in lags.items()}
        text, advice, limit_s = _LAGS[name]
        if max(lags.values()) >= limit_s:
            self.findings.append(Finding(name, "worse", said, text, advice, figures))
        else:
            self.findings.append(Finding(name, "fine", said, text, figures=figures))

    def _lock(self) -> None:
        try:
            with locked(self._board.path / "lock"):
                self._board.put("locked")
                answers = {peer.host: answer for peer, (_, _, answer) in self._collect("locked").items()}
        except OSError as error:
            self._board.put("locked")
            self._collect("locked")
            answers = {self._ranks.host: {"error": error.strerror}}
        wrong = [f"{host}: {answer['error']}" for host, answer in answers.items() if "error" in answer]
        wrong += [f"{host} got it too" for host, answer in answers.items() if answer.get("got")]
        if wrong or not answers:
            said = f"a lock that {self._ranks.host} holds: {', '.join(wrong) or 'nobody answered'}"
            advice = "mount it with locks that hold between hosts (NFS: version 4, without nolock and local_lock)"
            self.findings.append(
                Finding("locks between hosts", "worse", said, f"locks do not exclude here: {NO_ORDER}", advice)
            )
        else:
            text = "launches of the same moment are numbered in order"
            self.findings.append(Finding("locks between hosts", "fine", "they exclude each other", text))

    def _race(self) -> None:
        self._board.put("race")
        time.sleep(self._answer_s / 2)  # until the others have seen it
        own = _run_race(self._board)
        results = [own, *(answer for _, _, answer in self._collect("race").values())]
        rivals = f"{len(results)} hosts"
        self.findings.append(judge_race("mkdir between hosts", [tuple(result) for result in results], rivals))
        if len(results) <= len(self.peers):
            self.findings.append(Finding("mkdir between hosts", "unsafe", "a host did not answer", "", ELSEWHERE))


@contextlib.contextmanager
def leading(root: Path, word: str, ranks: Ranks, *, limit_s: float = SEEN_LIMIT_S) -> Iterator[tuple[Path, Lead]]:
    """Meet the other ranks and probe with them; yields an empty directory for more probes. Rank 0 only."""
    with fresh_directory(root, word) as folder:
        lead = Lead(Board(folder, 0), ranks, limit_s)
        own = folder / "one-host"
        own.mkdir()
        yield own, lead


def hosts_of(findings: Iterable[Finding]) -> list[str]:
    """Return the hosts that took part."""
    return next((finding.figures["hosts"] for finding in findings if finding.name == "shared"), [])
