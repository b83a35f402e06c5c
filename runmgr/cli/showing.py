"""`show` and `path`: look at one run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from runmgr.cli import curves, references, tables
from runmgr.disk import catalog, directory, drift, failures, record
from runmgr.disk.summary import mapping, sequence
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    show = commands.add_parser("show", help="show one run", allow_abbrev=False)
    show.add_argument("run", help=references.REFERENCE)
    curves.add_options(show)
    path = commands.add_parser("path", help="print where a run, or one of its files, lies", allow_abbrev=False)
    path.add_argument("run", help=references.REFERENCE)
    path.add_argument("file", nargs="?", help="latest, best, average or a file name")
    for command, function in ((show, _show), (path, _path)):
        command.set_defaults(command=function)
        references.add_common_options(command)


def _path(given: argparse.Namespace) -> int:
    path = references.find(given).path
    if given.file is not None:
        path = directory.RunDirectory(path).public_path(given.file)
        if not path.exists():
            near = catalog.nearest(path.name, _files(path.parent))
            raise RunNotFound(f"there is no {path}{near}", path=str(path))
    tables.print_json({"path": str(path)}) if given.json else print(path)
    return 0


def _show(given: argparse.Namespace) -> int:
    run = references.find(given)
    failure, differences = run.first_failure, run.drift
    if given.json:
        tables.print_json(run.as_json() | {"first_failure": failure, "drift": differences, "record": run.record})
        return 0
    content, place = run.record, directory.RunDirectory(run.path)
    error, parent = mapping(content.get("error")), mapping(run.parent)
    tables.print_facts(
        [
            ("run", run.run_id),
            ("path", run.path),
            ("status", ": ".join(filter(None, (run.status, record.newer_format(place))))),
            ("error", f"{error.get('type')}: {error.get('message')}" if error else ""),
            *_failure_rows(run, failure),
            ("created", run.created),
            ("ended", run.ended),
            ("attempt", run.attempt),
            ("changed", drift.sentence(differences, shown=3)),
            ("hosts", ", ".join(map(_host, sequence(content.get("hosts"))))),
            ("latest", _checkpoint(run.latest)),
            ("best", _checkpoint(run.best)),
            ("forked from", parent.get("path")),
            ("tags", " ".join(run.tags)),
            ("command", " ".join(map(str, sequence(content.get("argv"))))),
            ("git", _commit(mapping(content.get("git")))),
            ("files", " ".join(_files(run.path))),
        ]
    )
    curves.draw(given, [run])
    return 0


def _host(host: Any) -> str:
    host = mapping(host)
    devices = "".join(f", {name}" for name in sequence(host.get("devices")))
    return f"{host.get('host')} ({len(sequence(host.get('ranks')))} ranks{devices})"


def _commit(git: dict[str, Any]) -> str:
    commit = str(git.get("commit") or "")[:12]
    return f"{commit or 'no commit'} (with uncommitted changes)" if git.get("dirty") else commit


def _failure_rows(run: catalog.RunInfo, failure: dict[str, Any] | None) -> list[tuple[str, str]]:
    if failure is None:
        return []
    report = failure.get("report")
    rows = [("first failure", f"{failures.sentence(failure)} (attempt {failure.get('attempt')})")]
    return [*rows, ("because", str(failure.get("why"))), ("traceback", str(run.path / str(report)) if report else "")]


def _checkpoint(summary: dict[str, Any] | None) -> str:
    if not summary:
        return ""
    shown = {"epoch": summary.get("epoch"), "step": summary.get("step"), **mapping(summary.get("metrics"))}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _files(path: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError:  # not ours to look into, or gone by now
        return []
