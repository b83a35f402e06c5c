"""`ls`, `latest` and `best`: find runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING

from runmgr.cli import references, tables
from runmgr.cli.tables import Column
from runmgr.disk import catalog, directory
from runmgr.disk.filters import STATUSES, Filter
from runmgr.disk.metrics import value_of
from runmgr.disk.summary import mapping
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    from runmgr.disk.summary import OnProgress

_EXPERIMENTS = (Column("EXPERIMENT"), Column("LATEST RUN"))
_RUNS = (
    Column("RUN"),
    Column("STATUS", 1),
    Column("ATTEMPT", 6, is_number=True),
    Column("EPOCH", 3, is_number=True),
    Column("STEP", 4, is_number=True),
    Column("BEST", 2),
    Column("TAGS", 5),
)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    ls = commands.add_parser(
        "ls",
        help="list experiments, or the runs of one, or those that options ask for, newest first",
        allow_abbrev=False,
    )
    ls.add_argument("experiment", nargs="?", help="list this experiment's runs")
    ls.add_argument("-n", "--limit", type=references.positive, default=20, help="how many runs to list (20)")
    ls.add_argument("--all", action="store_true", help="list all of them")
    ls.add_argument(
        "--status", action="append", default=[], metavar="STATUS", help=f"only runs that are {', '.join(STATUSES)}"
    )
    ls.add_argument("--tag", action="append", default=[], help="only runs with this tag; given twice: with both")
    ls.add_argument(
        "--where", type=references.condition, action="append", default=[], metavar="CONDITION",
        help="only runs whose best or latest checkpoint fulfils it, such as 'val/accuracy>0.9' or 'epoch>=10'",
    )  # fmt: skip
    ls.add_argument("--newer-than", type=references.age_s, metavar="AGE", help="only runs made since, such as 12h, 7d")
    ls.add_argument("--older-than", type=references.age_s, metavar="AGE", help="only runs made before")
    latest = commands.add_parser("latest", help="print the id of the newest run with a checkpoint", allow_abbrev=False)
    latest.add_argument("experiment")
    best = commands.add_parser("best", help="print the id of the best run by a metric", allow_abbrev=False)
    best.add_argument("experiment")
    best.add_argument("--metric", help="a metric that was given to save() (the one that the newest run monitors)")
    best.add_argument("--mode", choices=("max", "min"), help="what is better (what the newest run says, else max)")
    for command, function in ((ls, _ls), (latest, _latest), (best, _best)):
        command.set_defaults(command=function)
        references.add_common_options(command)


def _ls(given: argparse.Namespace) -> int:
    wanted = Filter.of(
        status=given.status, tags=given.tag, where=given.where,
        newer_than_s=given.newer_than, older_than_s=given.older_than,
    )  # fmt: skip
    if given.experiment is None and wanted.lets_all_through:
        return _list_experiments(given)
    root = references.root_of(given)
    names = [given.experiment] if given.experiment is not None else references.experiments(root)
    with tables.progress("reading runs") as advance:
        limit = None if given.all else given.limit
        read = catalog.find if given.experiment is not None else _found
        found = [read(name, root, wanted, limit=limit, advance=advance) for name in names]
        runs = list(islice(merge(*found, key=lambda run: run.run_id, reverse=True), limit))
    columns = _RUNS if given.experiment is not None else (*_RUNS[:1], Column("EXPERIMENT"), *_RUNS[1:])
    rows = (
        _row(run) if given.experiment is not None else (run.run_id, run.experiment_name, *_row(run)[1:]) for run in runs
    )
    if given.json:
        tables.print_json([run.as_json() for run in runs])
    elif runs:
        tables.print_table(columns, rows)
    else:
        such, unknown = "such " * (not wanted.lets_all_through), _unknown_metric(wanted, names, root)
        print(f"no {such}runs in {root / (given.experiment or '')}{unknown}", file=sys.stderr)
    return 0


def _unknown_metric(wanted: Filter, names: list[str], root: Path) -> str:
    """Say of which metric a condition is that none of the newest runs has saved, if there is one."""
    known: set[str] = set()
    for name in names if wanted.conditions else ():
        with suppress(PermissionError):  # which was told before
            known |= catalog.newest_metrics(directory.Experiment(root, name))
    for condition in wanted.conditions:
        if known and condition.name not in known | {"epoch", "step"}:
            near = catalog.nearest(condition.name, sorted(known))
            return f"; none of the newest has saved a metric {condition.name!r}{near}"
    return ""


def _found(name: str, root: Path, wanted: Filter, limit: int | None, advance: OnProgress) -> Iterator[catalog.RunInfo]:
    """Yield an experiment's runs, newest first; one that may not be listed is named and does not hide the others."""
    try:
        yield from catalog.find(name, root, wanted, limit=limit, advance=advance)
    except PermissionError as error:
        print(f"runmgr: {error}", file=sys.stderr)


def _list_experiments(given: argparse.Namespace) -> int:
    root = references.root_of(given)
    rows = []
    for name in references.experiments(root):
        try:
            rows.append((name, catalog.get_latest_run_id(name, root)))
        except PermissionError as error:
            rows.append((name, None))
            print(f"runmgr: {error}", file=sys.stderr)
    if given.json:
        tables.print_json([{"experiment_name": name, "latest": latest} for name, latest in rows])
    elif rows:
        tables.print_table(_EXPERIMENTS, rows)
    else:
        print(f"no experiments in {root}", file=sys.stderr)
    return 0


def _row(run: catalog.RunInfo) -> tuple[object, ...]:
    latest = mapping(run.latest)
    value = value_of(run.best, run.monitor) if run.monitor else None
    best = "" if value is None else f"{run.monitor} {value:.6g}"
    return (run.run_id, run.status, run.attempt, latest.get("epoch"), latest.get("step"), best, " ".join(run.tags))


def _latest(given: argparse.Namespace) -> int:
    root = references.root_of(given)
    run_id = catalog.get_latest_run_id(given.experiment, root)
    if run_id is None:
        experiment = catalog.find_experiment(given.experiment, root)
        raise RunNotFound(f"no run in {experiment.path} has a {directory.LATEST_NAME} yet", path=str(experiment.path))
    path = root / given.experiment / run_id
    tables.print_json({"run_id": run_id, "path": str(path)}) if given.json else print(run_id)
    return 0


def _best(given: argparse.Namespace) -> int:
    root = references.root_of(given)
    with tables.progress("reading runs") as advance:
        run = catalog.best_run(given.experiment, given.metric, mode=given.mode, ckpt_root_dir=root, on_progress=advance)
    tables.print_json(run.as_json()) if given.json else print(run.run_id)
    return 0
