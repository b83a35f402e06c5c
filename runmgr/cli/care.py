"""`verify`, `pin` and `unpin`: are the checkpoints whole, and which of them stay."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from runmgr.cli import references, tables
from runmgr.disk import checkpoints, directory, integrity, pins, record
from runmgr.errors import CheckpointCorrupt

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_REDRAW_S = 0.1
_LOOKS, _LOOK_AGAIN_S = 10, 0.2


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    verify = commands.add_parser("verify", help="check that a run's checkpoints are whole", allow_abbrev=False)
    verify.add_argument("run", help=references.REFERENCE)
    verify.add_argument("--deep", action="store_true", help="read every byte, not only sizes and tables of contents")
    verify.set_defaults(command=_verify)
    references.add_common_options(verify)
    for name, function, text in (
        ("pin", _pin, "let a checkpoint stay whatever Keep says"),
        ("unpin", _unpin, "leave a pinned checkpoint to Keep again"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("run", help=references.REFERENCE)
        command.add_argument("file", nargs="?", default="latest", help="latest (the default), best or a file name")
        command.set_defaults(command=function)
        references.add_common_options(command)


def _verify(given: argparse.Namespace) -> int:
    """Check each object against its record and each public name against its object; status 1 if anything is wrong."""
    run = directory.RunDirectory(references.find(given).path)
    entries = checkpoints.listed(run)
    bar = _Bar(sum(entry.size_bytes for entry in entries)) if given.deep else None
    found = [item for entry in entries if (item := _judged(run, entry, bar)) is not None]
    if bar is not None:
        bar.close()
    damaged = [item for item in found if item["problem"]]
    if given.json:
        tables.print_json({"run_id": run.run_id, "deep": given.deep, "checkpoints": found})
    else:
        for item in found:
            print(f"{'DAMAGED' if item['problem'] else 'ok':<8} {item['file']}  {', '.join(item['names'])}".rstrip())
            if item["problem"]:
                print(f"         {item['problem']}")
        how = "every byte read" if given.deep else "sizes and tables of contents; --deep reads every byte"
        print(f"{len(found)} checkpoints of {run.run_id}, {len(damaged)} damaged ({how})")
    return 1 if damaged else 0


def _judged(run: directory.RunDirectory, entry: checkpoints.Checkpoint, bar: _Bar | None) -> dict[str, Any] | None:
    """Say what is wrong with a checkpoint, if anything; None when the training removed it meanwhile."""
    problem = _problem(run, entry, bar)
    for _ in range(_LOOKS):  # a save may be between its record and its names
        if problem is None or record.status_of(run, record.look_at_json(run.record_path)) != "running":
            break
        time.sleep(_LOOK_AGAIN_S)
        now = next((other for other in checkpoints.listed(run) if other.object_name == entry.object_name), None)
        if now is None:
            return None
        entry, problem = now, _problem(run, now, bar)
    return {"file": entry.object_name, "names": list(entry.names), "problem": problem}


def _problem(run: directory.RunDirectory, entry: checkpoints.Checkpoint, bar: _Bar | None) -> str | None:
    path = entry.path_in(run)
    try:
        if bar is None:
            integrity.check_outline(path, size_bytes=entry.size_bytes, expected_digest=entry.digest)
        else:
            checkpoints.verify(run, entry, bar.advance)
        for name in entry.names:
            public = run.path / name
            if not checkpoints.is_same_content(path, public):
                return f"{public} is missing or holds something else"
            if bar is not None and not path.samefile(public):
                integrity.check_content(public)
    except (CheckpointCorrupt, OSError) as error:
        return str(error)
    return None


class _Bar:
    """How far it is, on a terminal; nothing anywhere else."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._done, self._drawn = max(total_bytes, 1), 0, 0.0
        self._lock = threading.Lock()
        self._is_shown = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
        if self._is_shown and time.monotonic() - self._drawn > _REDRAW_S:
            self._drawn = time.monotonic()
            part = min(1.0, self._done / self._total)
            print(
                f"\r[{'#' * round(30 * part):<30}] {part:4.0%} of {self._total / 1e9:.2f} GB", end="", file=sys.stderr
            )

    def close(self) -> None:
        if self._is_shown:
            print("\r\033[K", end="", file=sys.stderr)


def _pin(given: argparse.Namespace) -> int:
    return _change(given, pins.pin, "pinned")


def _unpin(given: argparse.Namespace) -> int:
    return _change(given, pins.unpin, "not pinned any more")


def _change(given: argparse.Namespace, change: Callable[..., checkpoints.Checkpoint], said: str) -> int:
    run = directory.RunDirectory(references.find(given).path)
    name = run.public_path(given.file).name
    entry: Any = change(run, name)
    if given.json:
        tables.print_json(entry.as_json())
    else:
        print(f"{entry.object_name} (epoch {entry.epoch}, step {entry.step}) is {said}")
    return 0
