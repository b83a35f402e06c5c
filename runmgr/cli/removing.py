"""`rm` and `restore`: runs to the trash and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from runmgr.cli import references, several, tables
from runmgr.disk import care, directory, trash

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from runmgr.disk.catalog import RunInfo


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    remove = commands.add_parser("rm", help="move runs to the trash", allow_abbrev=False)
    remove.add_argument("run", nargs="+", help="EXPERIMENT/RUN_…, RUN_…, EXPERIMENT@-2, or the path of a run")
    restore = commands.add_parser("restore", help="bring runs back from the trash", allow_abbrev=False)
    restore.add_argument("run", nargs="+", help="EXPERIMENT/RUN_… or RUN_…; `runmgr purge EXPERIMENT` lists them")
    for command, function in ((remove, _remove), (restore, _restore)):
        command.set_defaults(command=function)
        references.add_common_options(command)


def _remove(given: argparse.Namespace) -> int:
    """Move each run to the trash; one that cannot go stops no other, and makes it status 1."""
    root = references.root_of(given)
    told = several.Several()
    found = told.each(given.run, lambda text: care.run_to_remove(text, root))  # all, before the first one is gone
    runs = {run.path: run for run in found}.values()

    def discarded(run: RunInfo) -> tuple[RunInfo, Path] | None:
        path = told.one(run.run_id, lambda: trash.discard(directory.RunDirectory(run.path)))
        return None if path is None else (run, path)

    with ThreadPoolExecutor(several.AT_ONCE) as pool:
        moved = [item for item in pool.map(discarded, runs) if item is not None]
    if given.json:
        tables.print_json(told.as_json(removed=[{"run_id": run.run_id, "path": str(path)} for run, path in moved]))
    else:
        for run, _ in moved:
            print(f"{run.run_id} is in the trash; `runmgr restore {run.experiment_name}/{run.run_id}` brings it back")
    return told.status


def _restore(given: argparse.Namespace) -> int:
    """Bring each run back; one that cannot come stops no other, and makes it status 1."""
    root = references.root_of(given)
    told = several.Several()
    runs = told.each(given.run, lambda text: care.restore_run(text, ckpt_root_dir=root))
    if given.json:
        tables.print_json(told.as_json(restored=[{"run_id": run.run_id, "path": str(run.path)} for run in runs]))
    else:
        for run in runs:
            print(f"{run.run_id} is back in {run.path.parent}")
    return told.status
