"""`verify`, `tag`, `untag`, `pin`, `unpin` and `export`: are the checkpoints whole, which of them stay, take one along."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.cli import references, tables, units
from runmgr.disk import catalog, checkpoints, directory, exporting, pins, tags, verification
from runmgr.errors import InvalidInput, RunError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from runmgr.disk.checkpoints import Checkpoint

_MB = 1_000_000
_FILE = "latest (the default), best, average or a file name"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    verify = commands.add_parser("verify", help="check that a run's checkpoints are whole", allow_abbrev=False)
    verify.add_argument("run", nargs="?", help=f"{references.REFERENCE}; with --all an experiment")
    verify.add_argument(
        "--all", action="store_true", help="check all runs, of one experiment or of all, and print what is wrong"
    )
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
    listed, unread = _listed(given)
    total = sum(entry.size_bytes for _, entries in listed for entry in entries)
    with tables.counting("MB checked", total, unit=_MB) if given.deep else nullcontext() as on_bytes:
        found = [(run, list(verification.check(run, entries, on_bytes))) for run, entries in listed]
    damaged = sum(problem is not None for _, checked in found for _, problem in checked)
    if given.json:
        told = [_as_json(run, checked, given) for run, checked in found]
        tables.print_json(told if given.all else told[0])
    else:
        for run, checked in found:
            for entry, problem in checked:
                if problem or not given.all:
                    name = f"{run.path.parent.name}/{run.run_id}/" * given.all + entry.object_name
                    print(f"{'DAMAGED' if problem else 'ok':<8} {name}  {', '.join(entry.names)}".rstrip())
                if problem:
                    print(f"         {problem}")
        of = f"{len(found)} runs" if given.all else found[0][0].run_id
        how = "every byte read" if given.deep else "sizes and tables of contents; --deep reads every byte"
        print(f"{sum(len(checked) for _, checked in found)} checkpoints of {of}, {damaged} damaged ({how})")
    return 1 if damaged or unread else 0


def _listed(given: argparse.Namespace) -> tuple[list[tuple[directory.RunDirectory, list[Checkpoint]]], int]:
    """Return the runs that are meant with what their records list, and how many cannot be read, which stderr names."""
    if not given.all:
        if given.run is None:
            raise InvalidInput("give a run, or --all")
        return [(run := _found(given), checkpoints.listed(run))], 0
    root, found, unread = references.root_of(given), [], 0
    experiments = [given.run] if given.run is not None else references.experiments(root)
    for experiment in experiments:
        place = catalog.find_experiment(experiment, root)
        for run in map(place.run, catalog.newest_ids(place)):
            try:
                found.append((run, checkpoints.listed(run)))
            except (RunError, OSError) as error:
                print(f"runmgr: {error}", file=sys.stderr)
                unread += 1
    return found, unread


def _as_json(
    run: directory.RunDirectory, checked: list[verification.Checked], given: argparse.Namespace
) -> dict[str, Any]:
    told = [{"file": entry.object_name, "names": list(entry.names), "problem": problem} for entry, problem in checked]
    return {"run_id": run.run_id, "deep": given.deep, "checkpoints": told}


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
