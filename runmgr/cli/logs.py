"""`logs`: what a rank logged, attempt after attempt; also while it is being written."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from runmgr.cli import references, tables
from runmgr.disk import catalog, directory
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    from runmgr.disk.catalog import RunInfo

_POLL_S = 0.5
_WAIT_S = 10.0
_CHUNK_BYTES = 1 << 20
_ENDED_FOR_GOOD = ("completed", "interrupted", "unknown", "unreadable")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command of this file."""
    logs = commands.add_parser("logs", help="print what a rank logged, attempt after attempt", allow_abbrev=False)
    logs.add_argument("run", help=references.REFERENCE)
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until the run ends")
    logs.add_argument("--rank", type=_rank, default=0, help="whose log (0)")
    logs.add_argument("-n", "--lines", type=references.positive, help="only the last so many lines")
    logs.add_argument(
        "--wait", type=references.age_s, default=_WAIT_S, metavar="AGE",
        help="with -f: how long to wait for the next attempt after one that failed or was preempted (10s)",
    )  # fmt: skip
    references.add_common_options(logs)
    logs.set_defaults(command=_logs)


def _rank(text: str) -> int:
    return 0 if text == "0" else references.positive(text)


def _logs(given: argparse.Namespace) -> int:
    run = references.find(given)
    paths = run.log_paths(given.rank)
    if given.json:
        tables.print_json({"run_id": run.run_id, "rank": given.rank, "files": list(map(str, paths))})
        return 0
    if not given.follow and not paths:
        others = sorted({rank for rank, _ in directory.RunDirectory(run.path).logs()})
        has = f"ranks with a log: {', '.join(map(str, others))}" if others else "no rank has logged anything"
        raise RunNotFound(f"rank {given.rank} of run {run.run_id} has no log; {has}", path=str(run.path))
    reader = _Reader(run, given.rank)
    _write(_last_lines(reader, given.lines) if given.lines else reader.news())
    if given.follow:
        _follow(run, reader, given.wait)
    return 0


def _follow(run: RunInfo, reader: _Reader, wait_s: float) -> None:
    """Print what comes until the run has ended, and no other attempt began in time."""
    attempt, ended_since = run.attempt, None
    while True:
        now = catalog.get_run(run.experiment_name, run.run_id, run.path.parent.parent)
        if now.attempt != attempt:
            attempt, ended_since = now.attempt, None
        has_news = _write(reader.news())  # after the status was read, so the last words are not lost
        if now.status == "running":
            ended_since = None
        elif not has_news:
            ended_since = ended_since or time.monotonic()
            if now.status in _ENDED_FOR_GOOD or time.monotonic() - ended_since >= wait_s:
                print(f"runmgr: run {run.run_id}: {now.status}", file=sys.stderr)
                return
        time.sleep(_POLL_S)


class _Reader:
    """Reads one rank's logs on from where it stopped. Files are opened anew each time, so that a file server answers."""

    def __init__(self, run: RunInfo, rank: int) -> None:
        self._run, self._rank = run, rank
        self._read_bytes: dict[Path, int] = {}
        self._last: Path | None = None

    def news(self) -> Iterator[bytes]:
        """Yield what is new, with a line between the files as `tail` writes it."""
        for path in self._run.log_paths(self._rank):
            for content in self._rest(path):
                if path != self._last:
                    if self._last is not None:
                        yield f"\n==> {path.name} <==\n".encode()
                    self._last = path
                yield content

    def _rest(self, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                while content := file.read(_CHUNK_BYTES):
                    self._read_bytes[path] = file.tell()
                    yield content
        except FileNotFoundError:  # removed meanwhile
            return


def _last_lines(reader: _Reader, count: int) -> list[bytes]:
    return b"".join(reader.news()).splitlines(keepends=True)[-count:]


def _write(contents: Iterator[bytes] | list[bytes]) -> bool:
    """Write bytes as they are; says whether there were any."""
    has_any = False
    for content in contents:
        has_any = True
        sys.stdout.flush()
        if binary := getattr(sys.stdout, "buffer", None):
            binary.write(content)
        else:  # a stand-in for text only
            sys.stdout.write(content.decode(errors="replace"))
    sys.stdout.flush()
    return has_any
