"""`prune` and `purge`: what may go to the trash, and out of it for good. Both only tell what they would do, without --yes."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from runmgr.cli import references, several, tables, units
from runmgr.cli.tables import Column
from runmgr.disk import care, pruning, trash, usage

if TYPE_CHECKING:
    import argparse

_GOING = (Column("RUN"), Column("STATUS", 2), Column("SIZE", 1, is_number=True), Column("WHY IT GOES", 3))
_KEPT = (Column("RUN"), Column("STATUS", 1), Column("WHY IT STAYS", 2))
_TRASHED = (Column("RUN"), Column("REMOVED", 1), Column("SIZE", 2, is_number=True), Column("TAGS", 3))


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands of this file."""
    prune = commands.add_parser(
        "prune", help="move an experiment's runs to the trash, but for the newest, the best and the protected",
        allow_abbrev=False,
    )  # fmt: skip
    prune.add_argument("experiment")
    prune.add_argument("--keep-last", type=_count, metavar="N", help="keep the N newest runs")
    prune.add_argument("--keep-best", type=_count, metavar="N", help="keep the N best runs by the metric")
    prune.add_argument(
        "--older-than", type=references.age_s, metavar="AGE", help="keep what was touched since, such as 30d"
    )
    prune.add_argument("--metric", help="a metric that was given to save() (the one that the newest run monitors)")
    prune.add_argument("--mode", choices=("max", "min"), help="what is better (what the newest run says, else max)")
    prune.set_defaults(command=_prune, refuse=prune.error)
    purge = commands.add_parser(
        "purge", help="list an experiment's trash, and delete what is in it for good", allow_abbrev=False
    )
    purge.add_argument("experiment")
    purge.add_argument("run", nargs="*", metavar="RUN_…", help="only these (all)")
    purge.add_argument(
        "--older-than", type=references.age_s, metavar="AGE", help="only what was removed before, such as 30d"
    )
    purge.set_defaults(command=_purge)
    for command in (prune, purge):
        command.add_argument("--yes", action="store_true", help="do it; without it nothing is changed, only told")
        references.add_common_options(command)


def _count(text: str) -> int:
    return 0 if text == "0" else references.positive(text)


def _prune(given: argparse.Namespace) -> int:
    """Tell what would go and why the rest stays; with --yes, do it. Status 1 if a run could not be moved."""
    if given.keep_last is None and given.keep_best is None and given.older_than is None:
        given.refuse("say what to keep: one or more of --keep-last, --keep-best and --older-than")
    with tables.progress("reading runs") as advance:
        plan = pruning.plan_prune(
            given.experiment, keep_last=given.keep_last, keep_best=given.keep_best, older_than_s=given.older_than,
            metric=given.metric, mode=given.mode, ckpt_root_dir=references.root_of(given), on_progress=advance,
        )  # fmt: skip
    if not given.json:
        _print_plan(plan)
    if not given.yes or not plan.going:
        freed = plan.freed_bytes
        if given.json:
            tables.print_json(_plan_as_json(plan) | {"removed": [], "errors": []})
        elif plan.going:
            print(
                f"{len(plan.going)} of {len(plan.going) + len(plan.kept)} runs would go to the trash with --yes; "
                f"{units.shown_bytes(freed)} free once it is purged{_shared(plan, freed)}"
            )
        else:
            print("nothing to prune")
        return 0
    told = _plan_as_json(plan) if given.json else {}  # measured before anything moves
    with tables.counting("moved to the trash", len(plan.going)) as on_run:
        done = plan.carry_out(lambda: on_run(1))
    for verdict, error in (*done.kept, *done.failed):
        print(f"runmgr: {verdict.run.run_id} stays: {error}", file=sys.stderr)
    if given.json:
        errors = [{"run": verdict.run.run_id, "error": str(error)} for verdict, error in (*done.kept, *done.failed)]
        tables.print_json(told | {"removed": [item.run.run_id for item in done.removed], "errors": errors})
    else:
        print(
            f"{len(done.removed)} runs are in the trash; `runmgr restore RUN_…` brings one back, "
            f"`runmgr purge {given.experiment} --yes` frees their bytes"
        )
    return 1 if done.failed else 0


def _print_plan(plan: pruning.PrunePlan) -> None:
    if plan.kept:
        tables.print_table(_KEPT, [(item.run.run_id, item.run.status, item.why) for item in plan.kept])
        print()
    if plan.going:
        rows = [(item.run.run_id, item.run.status, units.shown_bytes(item.size_bytes), item.why) for item in plan.going]
        tables.print_table(_GOING, rows)
        print()


def _shared(plan: pruning.PrunePlan, freed: int) -> str:
    shared = sum(item.size_bytes for item in plan.going) - freed
    return f" ({units.shown_bytes(shared)} of the sizes are shared by several runs)" if shared > 0 else ""


def _plan_as_json(plan: pruning.PrunePlan) -> dict[str, Any]:
    def told(item: pruning.Verdict) -> dict[str, Any]:
        return {"run_id": item.run.run_id, "path": str(item.run.path), "status": item.run.status, "why": item.why}

    return {
        "going": [told(item) | {"size_bytes": item.size_bytes} for item in plan.going],
        "kept": [told(item) for item in plan.kept],
        "freed_bytes": plan.freed_bytes,
    }


def _purge(given: argparse.Namespace) -> int:
    """List the trash; with --yes, delete it for good. Status 1 if something could not be deleted."""
    found = _chosen(given)
    freed = usage.freed_bytes(item.usage for item in found)
    content = {"trash": [_trashed_as_json(item) for item in found], "freed_bytes": freed}
    if given.yes:
        return _delete(given, found, content)
    if given.json:
        tables.print_json(content | {"purged": [], "errors": []})
    elif found:
        rows = [
            (item.run.run_id, item.removed[:19], units.shown_bytes(item.size_bytes), " ".join(item.run.tags))
            for item in found
        ]
        tables.print_table(_TRASHED, rows)
        print(f"\n{len(found)} runs would be deleted for good with --yes; {units.shown_bytes(freed)} would be free")
    else:
        print("nothing in the trash to purge", file=sys.stderr)
    return 0


def _delete(given: argparse.Namespace, found: list[trash.TrashedRun], content: dict[str, Any]) -> int:
    told, root = several.Several(), references.root_of(given)
    told.one(given.experiment, lambda: trash.purge_trash(given.experiment, [], root))  # what a killed one left
    with tables.counting("deleted", len(found)) as on_run:

        def delete(run_id: str) -> str:
            trash.purge_trash(given.experiment, [run_id], root)
            on_run(1)
            return run_id

        purged = told.each([item.run.run_id for item in found], delete)
    if given.json:
        tables.print_json(content | told.as_json(purged=purged))
    else:
        print(f"{len(purged)} runs are deleted for good")
    return told.status


def _chosen(given: argparse.Namespace) -> list[trash.TrashedRun]:
    """Return what of the trash is meant; a run that is named and not there is an error before anything is deleted."""
    root, now = references.root_of(given), datetime.now(UTC)
    for run_id in given.run:
        care.trashed(f"{given.experiment}/{run_id}", root)
    return [
        item
        for item in trash.list_trash(given.experiment, root)
        if (not given.run or item.run.run_id in given.run)
        and (
            given.older_than is None or (now - datetime.fromisoformat(item.removed)).total_seconds() > given.older_than
        )
    ]


def _trashed_as_json(item: trash.TrashedRun) -> dict[str, Any]:
    return item.run.as_json() | {"removed": item.removed, "size_bytes": item.size_bytes}
