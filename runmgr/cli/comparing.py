"""`compare`: runs side by side, what differs first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runmgr.cli import curves, references, tables
from runmgr.cli.tables import Column
from runmgr.disk import comparing

if TYPE_CHECKING:
    import argparse

_MISSING = "-"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command of this file."""
    compare = commands.add_parser(
        "compare", help="show runs side by side: what differs in metrics, config, git, packages", allow_abbrev=False
    )
    compare.add_argument("run", nargs="+", help=references.REFERENCE)
    compare.add_argument("--all", action="store_true", help="show what is the same as well")
    curves.add_options(compare)
    references.add_common_options(compare)
    compare.set_defaults(command=_compare)


def _compare(given: argparse.Namespace) -> int:
    runs = [references.find(given, reference) for reference in given.run]
    found = comparing.compare_runs(runs)
    if given.json:
        tables.print_json(found.as_json())
        return 0
    columns = [Column("", folds=True), *(Column(run.run_id, folds=True) for run in runs)]
    rows = list(_rows(found.different))
    counts = [f"{kind} {len(rows)}" for kind, rows in found.same.items() if rows]
    if given.all:
        rows += [("", *("" for _ in runs)), ("the same", *("" for _ in runs)), *_rows(found.same)]
    tables.print_table(columns, rows)
    if not given.all and counts:
        tables.print_line(f"the same: {', '.join(counts)}; --all shows them", style="dim")
    curves.draw(given, runs)
    return 0


def _rows(kinds: dict[str, dict[str, tuple[Any, ...]]]) -> list[tuple[str, ...]]:
    return [
        (name if kind in {"run", "metrics"} else f"{kind} {name}", *map(_cell, row))
        for kind, rows in kinds.items()
        for name, row in rows.items()
    ]


def _cell(value: Any) -> str:
    if value is None or value == "":
        return _MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)
