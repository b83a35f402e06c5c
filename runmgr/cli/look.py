"""`ls`, `show`, `path` and `latest`: find runs and look at them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.disk import catalog, directory, drift, failures
from runmgr.disk import record as records
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

REFERENCE = "EXPERIMENT (its latest run), EXPERIMENT/latest, EXPERIMENT/best, EXPERIMENT/RUN_…, RUN_…, or a path"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    ls = commands.add_parser("ls", help="list experiments, or the runs of one, newest first", allow_abbrev=False)
    ls.add_argument("experiment", nargs="?", help="list this experiment's runs")
    ls.add_argument("-n", "--limit", type=_positive, default=20, help="how many runs to list (20)")
    show = commands.add_parser("show", help="show one run", allow_abbrev=False)
    show.add_argument("run", help=REFERENCE)
    path = commands.add_parser("path", help="print where a run, or one of its files, lies", allow_abbrev=False)
    path.add_argument("run", help=REFERENCE)
    path.add_argument("file", nargs="?", help="latest, best, average or a file name")
    latest = commands.add_parser("latest", help="print the id of the newest run with a checkpoint", allow_abbrev=False)
    latest.add_argument("experiment")
    for command, function in ((ls, _ls), (show, _show), (path, _path), (latest, _latest)):
        command.set_defaults(command=function)
        add_common_options(command)


def add_common_options(command: argparse.ArgumentParser) -> None:
    """Declare what every command takes."""
    command.add_argument(
        "--root", help="where experiments lie ($RUNMGR_CKPT_ROOT_DIR, else the project's checkpoints/)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    import argparse

    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def root_of(given: argparse.Namespace) -> Path:
    """Return the root that is meant: a command belongs to the project it is typed in."""
    return directory.resolve_root(given.root) if given.root else directory.default_root(Path.cwd())


def _latest(given: argparse.Namespace) -> int:
    root = root_of(given)
    run_id = catalog.get_latest_run_id(given.experiment, root)
    if run_id is None:
        experiment = catalog.find_experiment(given.experiment, root)
        raise RunNotFound(f"no run in {experiment.path} has a {directory.LATEST_NAME} yet", path=str(experiment.path))
    path = root / given.experiment / run_id
    print_json({"run_id": run_id, "path": str(path)}) if given.json else print(run_id)
    return 0


def _path(given: argparse.Namespace) -> int:
    path = find(given.run, root_of(given)).path
    if given.file is not None:
        path = directory.RunDirectory(path).public_path(given.file)
        if not path.exists():
            raise RunNotFound(f"there is no {path}", path=str(path))
    print_json({"path": str(path)}) if given.json else print(path)
    return 0


def _ls(given: argparse.Namespace) -> int:
    root = root_of(given)
    if given.experiment is None:
        names = catalog.list_experiments(root)
        rows = [(name, catalog.get_latest_run_id(name, root) or "") for name in names if _is_name(name)]
        if given.json:
            print_json([{"experiment_name": name, "latest": latest or None} for name, latest in rows])
        elif rows:
            _print_table(("EXPERIMENT", "LATEST RUN"), rows)
        else:
            print(f"no experiments in {root}", file=sys.stderr)
        return 0
    runs = catalog.list_runs(given.experiment, root, limit=given.limit)
    if given.json:
        print_json([run.as_json() for run in runs])
    elif runs:
        _print_table(("RUN", "STATUS", "ATTEMPT", "EPOCH", "STEP", "BEST", "TAGS"), map(_row, runs))
    else:
        print(f"no runs in {root / given.experiment}", file=sys.stderr)
    return 0


def _row(run: catalog.RunInfo) -> tuple[str, ...]:
    latest, best = run.latest or {}, (run.best or {}).get("metrics") or {}
    value = best.get(run.monitor)
    shown = f"{run.monitor} {value:.6g}" if isinstance(value, (int, float)) else ""
    columns = (run.attempt, latest.get("epoch"), latest.get("step"))
    return (
        run.run_id,
        run.status,
        *("" if value is None else str(value) for value in columns),
        shown,
        " ".join(run.tags),
    )


def _show(given: argparse.Namespace) -> int:
    run = find(given.run, root_of(given))
    failure, differences = _first_failure(run), _drift(run)
    if given.json:
        print_json(run.as_json() | {"first_failure": failure, "drift": differences, "record": run.record})
        return 0
    record = run.record
    git, error = record.get("git") or {}, record.get("error") or {}
    commit = str(git.get("commit") or "")[:12] + (" (with uncommitted changes)" if git.get("dirty") else "")
    hosts = ", ".join(
        f"{host.get('host')} ({len(host.get('ranks', []))} ranks{''.join(', ' + name for name in host.get('devices', []))})"
        for host in record.get("hosts") or []
    )
    rows = [
        ("run", run.run_id),
        ("path", str(run.path)),
        ("status", run.status),
        ("error", f"{error.get('type')}: {error.get('message')}" if error else ""),
        *_failure_rows(run, failure),
        ("created", run.created or ""),
        ("ended", run.ended or ""),
        ("attempt", "" if run.attempt is None else str(run.attempt)),
        ("changed", drift.sentence(differences, shown=3)),
        ("hosts", hosts),
        ("latest", _checkpoint(run.latest)),
        ("best", _checkpoint(run.best)),
        ("forked from", str((record.get("parent") or {}).get("path", ""))),
        ("tags", " ".join(run.tags)),
        ("command", " ".join(map(str, record.get("argv") or []))),
        ("git", commit),
        ("files", " ".join(_files(run.path))),
    ]
    shown = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")
    return 0


def _first_failure(run: catalog.RunInfo) -> dict[str, Any] | None:
    """Return what the reports of the newest attempt say by now, else what run.json says of an earlier one."""
    folder = directory.RunDirectory(run.path)
    found = failures.first(folder, records.newest_record(folder))
    if found is None and run.status == "lost":
        found = failures.unheard(run.attempt or 0)
    known = run.record.get("first_failure")
    return found or (known if isinstance(known, dict) else None)


def _failure_rows(run: catalog.RunInfo, failure: dict[str, Any] | None) -> list[tuple[str, str]]:
    if failure is None:
        return []
    report = failure.get("report")
    rows = [("first failure", f"{failures.sentence(failure)} (attempt {failure.get('attempt')})")]
    return [*rows, ("because", str(failure.get("why"))), ("traceback", str(run.path / report) if report else "")]


def _drift(run: catalog.RunInfo) -> dict[str, Any]:
    found = records.newest_record(directory.RunDirectory(run.path)).get("drift")
    return found if isinstance(found, dict) else {}


def _checkpoint(summary: dict[str, Any] | None) -> str:
    if not summary:
        return ""
    metrics = ", ".join(f"{name} {value}" for name, value in (summary.get("metrics") or {}).items())
    return f"epoch {summary.get('epoch')}, step {summary.get('step')}{', ' + metrics if metrics else ''}"


def _files(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def find(reference: str, root: Path) -> catalog.RunInfo:
    """Return the run that a reference means; raises RunNotFound or InvalidName."""
    path = Path(reference)
    if path.is_absolute() or reference.startswith(("./", "../")) or (path.is_dir() and directory.is_run_id(path.name)):
        path = path.absolute()
        return catalog.get_run(path.parent.name, path.name, path.parent.parent)
    experiment, slash, which = reference.rstrip("/").partition("/")
    if not slash and directory.is_run_id(experiment):
        for name in catalog.list_experiments(root):
            if (root / name / experiment).is_dir():
                return catalog.get_run(name, experiment, root)
        raise RunNotFound(f"no experiment in {root} has a run {experiment}", path=str(root))
    if which in {"", "latest"}:
        return catalog.get_run(experiment, None, root)
    if which == "best":
        return _best(experiment, root)
    return catalog.get_run(experiment, which, root)


def _best(experiment: str, root: Path) -> catalog.RunInfo:
    """Return the best run by the metric that the newest run watches."""
    watching = (run for run in catalog.list_runs(experiment, root) if run.monitor)
    newest = next(watching, None)
    if newest is None or newest.monitor is None:
        path = root / experiment
        raise RunNotFound(f"no run in {path} has a monitored metric, so none is best", path=str(path))
    return catalog.best_run(
        experiment, newest.monitor, mode="min" if newest.mode == "min" else "max", ckpt_root_dir=root
    )


def _is_name(name: str) -> bool:
    try:
        directory.check_name(name, "experiment name")
    except ValueError:
        return False
    return True


def print_json(value: Any) -> None:
    """Print what `--json` asks for."""
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [tuple(heads), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
