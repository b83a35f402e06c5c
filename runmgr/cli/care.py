"""`verify`, `tag`, `untag`, `pin`, `unpin` and `export`: are the checkpoints whole, which of them stay, take one along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.cli import references, tables, units
from runmgr.disk import checkpoints, directory, exporting, pins, tags, verification

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_MB = 1_000_000
_FILE = "latest (the default), best, average or a file name"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    verify = commands.add_parser("verify", help="check that a run's checkpoints are whole", allow_abbrev=False)
    verify.add_argument("run", help=references.REFERENCE)
    verify.add_argument("--deep", action="store_true", help="read every byte, not only sizes and tables of contents")
    verify.set_defaults(command=_verify)
    references.add_common_options(verify)
    for name, change, text in (
        ("tag", tags.add, "add tags to a run"),
        ("untag", tags.take_away, "take tags away from a run"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("run", help=references.REFERENCE)
        command.add_argument("tag", nargs="+", help="a word")
        command.set_defaults(command=_change_tags, change=change)
        references.add_common_options(command)
    for name, function, text in (
        ("pin", _pin, "let a checkpoint stay whatever Keep says, and its run whatever is pruned or removed"),
        ("unpin", _unpin, "leave a pinned checkpoint to Keep again"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("run", help=references.REFERENCE)
        command.add_argument("file", nargs="?", default="latest", help=_FILE)
        command.set_defaults(command=function)
        references.add_common_options(command)
    export = commands.add_parser("export", help="copy a checkpoint out of its run, to be changed", allow_abbrev=False)
    export.add_argument("run", help=references.REFERENCE)
    export.add_argument("file", nargs="?", default="latest", help=_FILE)
    export.add_argument("target", help="a file that is not there yet, or a directory")
    export.set_defaults(command=_export)
    references.add_common_options(export)


def _found(given: argparse.Namespace) -> directory.RunDirectory:
    return directory.RunDirectory(references.find(given).path)


def _verify(given: argparse.Namespace) -> int:
    """Check each object against its record and each public name against its object; status 1 if anything is wrong."""
    run = _found(given)
    entries = checkpoints.listed(run)
    if given.deep:
        total = sum(entry.size_bytes for entry in entries)
        with tables.counting("MB checked", total, unit=_MB) as on_bytes:
            found = list(verification.check(run, entries, on_bytes))
    else:
        found = list(verification.check(run, entries))
    damaged = [item for item in found if item.problem]
    if given.json:
        told = [{"file": entry.object_name, "names": list(entry.names), "problem": problem} for entry, problem in found]
        tables.print_json({"run_id": run.run_id, "deep": given.deep, "checkpoints": told})
    else:
        for entry, problem in found:
            print(f"{'DAMAGED' if problem else 'ok':<8} {entry.object_name}  {', '.join(entry.names)}".rstrip())
            if problem:
                print(f"         {problem}")
        how = "every byte read" if given.deep else "sizes and tables of contents; --deep reads every byte"
        print(f"{len(found)} checkpoints of {run.run_id}, {len(damaged)} damaged ({how})")
    return 1 if damaged else 0


def _change_tags(given: argparse.Namespace) -> int:
    run = _found(given)
    now = given.change(run, given.tag)
    if given.json:
        tables.print_json({"run_id": run.run_id, "tags": list(now)})
    else:
        print(f"{run.run_id} has the tags {' '.join(now)}" if now else f"{run.run_id} has no tags")
    return 0


def _pin(given: argparse.Namespace) -> int:
    return _change_pin(given, pins.pin, "pinned")


def _unpin(given: argparse.Namespace) -> int:
    return _change_pin(given, pins.unpin, "not pinned any more")


def _change_pin(given: argparse.Namespace, change: Callable[..., checkpoints.Checkpoint], said: str) -> int:
    run = _found(given)
    name = run.public_path(given.file).name
    entry: Any = change(run, name)
    if given.json:
        tables.print_json(entry.as_json())
    else:
        print(f"{entry.object_name} (epoch {entry.epoch}, step {entry.step}) is {said}")
    return 0


def _export(given: argparse.Namespace) -> int:
    run = _found(given)
    target = Path(given.target).expanduser().absolute()
    total = 2 * exporting.size_bytes(run, given.file)
    with tables.counting("MB copied and checked", total, unit=_MB) as on_bytes:
        path, size_bytes = exporting.export(run, given.file, target, on_bytes)
    name = run.public_path(given.file).name
    if given.json:
        tables.print_json({"run_id": run.run_id, "file": name, "path": str(path), "size_bytes": size_bytes})
    else:
        print(f"{path} is {name} of {run.run_id}, {units.shown_bytes(size_bytes)}, checked")
    return 0
