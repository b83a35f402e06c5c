"""`ls`, `latest` and `best`: find runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from runmgr.cli import references, tables
from runmgr.cli.tables import Column
from runmgr.disk import catalog, directory
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    import argparse

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
    ls = commands.add_parser("ls", help="list experiments, or the runs of one, newest first", allow_abbrev=False)
    ls.add_argument("experiment", nargs="?", help="list this experiment's runs")
    ls.add_argument("-n", "--limit", type=references.positive, default=20, help="how many runs to list (20)")
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
    return _list_experiments(given) if given.experiment is None else _list_runs(given)


def _list_experiments(given: argparse.Namespace) -> int:
    root = references.root_of(given)
    names = catalog.list_experiments(root)
    rows = [(name, catalog.get_latest_run_id(name, root)) for name in names if _is_name(name)]
    if given.json:
        tables.print_json([{"experiment_name": name, "latest": latest} for name, latest in rows])
    elif rows:
        tables.print_table(_EXPERIMENTS, rows)
    else:
        print(f"no experiments in {root}", file=sys.stderr)
    return 0


def _list_runs(given: argparse.Namespace) -> int:
    root = references.root_of(given)
    runs = catalog.list_runs(given.experiment, root, limit=given.limit)
    if given.json:
        tables.print_json([run.as_json() for run in runs])
    elif runs:
        tables.print_table(_RUNS, map(_row, runs))
    else:
        print(f"no runs in {root / given.experiment}", file=sys.stderr)
    return 0


def _row(run: catalog.RunInfo) -> tuple[object, ...]:
    latest, best = run.latest or {}, (run.best or {}).get("metrics") or {}
    value = best.get(run.monitor)
    shown = f"{run.monitor} {value:.6g}" if isinstance(value, (int, float)) else ""
    return (run.run_id, run.status, run.attempt, latest.get("epoch"), latest.get("step"), shown, " ".join(run.tags))


def _is_name(name: str) -> bool:
    try:
        directory.check_name(name, "experiment name")
    except ValueError:
        return False
    return True


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
    run = catalog.best_run(given.experiment, given.metric, mode=given.mode, ckpt_root_dir=references.root_of(given))
    tables.print_json(run.as_json()) if given.json else print(run.run_id)
    return 0
