"""`average`: the mean of checkpoints on disk, of one run or a soup of several. Torch is loaded by this command alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from runmgr.cli import references, tables
from runmgr.disk import integrity

if TYPE_CHECKING:
    import argparse

_COLUMNS = (
    tables.Column("EPOCH", is_number=True),
    tables.Column("STEP", is_number=True),
    tables.Column("METRIC", is_number=True),
    tables.Column("RUN", 2),
    tables.Column("FILE"),
)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command of this file."""
    average = commands.add_parser(
        "average", help="average checkpoints: a run's best, certain epochs, or a soup of files", allow_abbrev=False
    )
    average.add_argument(
        "sources", nargs="+", metavar="RUN|FILE",
        help="with --best or --epochs runs, each as the other commands take it; else checkpoint files, the newest last",
    )  # fmt: skip
    which = average.add_mutually_exclusive_group()
    which.add_argument(
        "--best", type=references.positive, metavar="N", help="the N best by the monitored metric, of all runs together"
    )
    which.add_argument("--epochs", type=_epochs, metavar="N,N,…", help="the checkpoints of these epochs, of each run")
    average.add_argument(
        "-o", "--output", metavar="FILE", help="where the average goes (average_model.pth in the run, if it is one run)"
    )
    average.add_argument("--key", help="the model's state dict in the files (net, or the only one there is)")
    average.add_argument("--device", default="cpu", help="cpu (the default) or cuda: where to add")
    average.add_argument("--force", action="store_true", help="replace FILE")
    average.set_defaults(command=_average)
    references.add_common_options(average)


def _epochs(text: str) -> tuple[int, ...]:
    return tuple(references.positive(number) for number in text.split(","))


def _average(given: argparse.Namespace) -> int:
    import runmgr

    with tables.progress("averaging, MiB") as show:
        path = runmgr.average_checkpoints(
            given.sources, given.output, best=given.best, epochs=given.epochs or (), key=given.key,
            ckpt_root_dir=references.root_of(given), device=given.device, overwrite=given.force,
            on_progress=lambda done_bytes, total_bytes: show(done_bytes >> 20, total_bytes >> 20),
        )  # fmt: skip
    members = integrity.contents(path)["members"]
    if given.json:
        tables.print_json({"path": str(path), "members": members})
        return 0
    rows = [(one["epoch"], one["step"], one["metric"], one["run_id"], one["checkpoint"]) for one in members]
    tables.print_table(_COLUMNS, rows)
    if given.best is not None and len(members) < given.best:
        print(f"runmgr: only {len(members)} of the {given.best} best are still there", file=sys.stderr)
    print(f"the average of these {len(members)} is {path}")
    return 0
