"""Prune an experiment: say which of its runs may go, and why the others stay; then move those to the trash."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.disk import catalog, pins, record, summary, trash, usage
from runmgr.disk.directory import Experiment, RunDirectory
from runmgr.disk.filters import Filter
from runmgr.disk.metrics import value_of
from runmgr.disk.summary import OnProgress, nobody
from runmgr.errors import InvalidInput, RunBusy, RunError, RunNotFound, RunProtected

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from runmgr.disk.catalog import RunInfo
    from runmgr.disk.checkpoints import Mode

_AT_ONCE = 32  # each may watch the mark of a dead holder for half a minute
_KNOWN = {*record.STATUSES, "lost"}
_SETTLED = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of one run, and why; its bytes on the disk where it goes, as `du` counts them."""

    run: RunInfo
    why: str
    usage: usage.Usage | None = field(default=None, repr=False)

    @property
    def size_bytes(self) -> int:
        """What a run that goes takes on the disk, each file once."""
        return 0 if self.usage is None else self.usage.size_bytes


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Which runs of an experiment would go, and which stay, newest first. Nothing happens before `carry_out`."""

    going: tuple[Verdict, ...]
    kept: tuple[Verdict, ...]

    @property
    def freed_bytes(self) -> int:
        """What the disk gets back once all that goes is purged: a file that a fork shares stays, and frees nothing."""
        return usage.freed_bytes(verdict.usage for verdict in self.going if verdict.usage is not None)

    def carry_out(self, on_run: Callable[[], object] = lambda: None) -> Pruned:
        """Move what goes to the trash. What is live, pinned or was trained on since stays; one that fails stops no other.

        Looks at each run again at a moment when nobody can begin to train in it. `on_run` is called after each.
        """

        def remove(verdict: Verdict) -> tuple[Verdict, Exception | None]:
            try:
                trash.discard(RunDirectory(verdict.run.path), lambda: _check_unchanged(verdict.run))
            except (RunError, OSError) as error:
                return verdict, error
            finally:
                on_run()
            return verdict, None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            ends = list(pool.map(remove, self.going))
        return Pruned(
            removed=tuple(verdict for verdict, error in ends if error is None),
            kept=tuple((verdict, error) for verdict, error in ends if isinstance(error, (RunBusy, RunProtected))),
            failed=tuple(
                (verdict, error)
                for verdict, error in ends
                if error is not None and not isinstance(error, (RunBusy, RunProtected, RunNotFound))
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a prune did: runs it moved to the trash, runs that it kept after all, and those that it could not move."""

    removed: tuple[Verdict, ...]
    kept: tuple[tuple[Verdict, Exception], ...]
    failed: tuple[tuple[Verdict, Exception], ...]


def plan_prune(
    experiment_name: str,
    *,
    keep_last: int | None = None,
    keep_best: int | None = None,
    older_than_s: float | None = None,
    metric: str | None = None,
    mode: Mode | None = None,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> PrunePlan:
    """Say which runs may go: those that are neither among the newest nor the best, and not touched for `older_than_s`.

    At least one of the three is needed. The best are judged by `metric` and `mode`, by default those that the newest run
    monitors. These stay whatever is asked: live runs; runs with a pinned checkpoint; runs whose checkpoint one that stays
    was forked from, in any experiment under the root; preempted ones, and others that ended unfinished less than ten
    minutes ago, which their launch may continue; and what runmgr did not make or cannot read. `on_progress` gets how many
    runs of how many were looked at.
    """
    _check_arguments(keep_last, keep_best, older_than_s)
    experiment = catalog.find_experiment(experiment_name, ckpt_root_dir)
    runs = list(catalog.find(experiment_name, ckpt_root_dir, Filter(), advance=on_progress or nobody))
    kept: dict[str, str] = {}
    going: dict[str, str] = {}
    best = _best(runs, keep_best, metric, mode) if keep_best else {}
    for place, run in enumerate(runs):
        why_kept, why_going = _judged(run, place, keep_last, keep_best, best, older_than_s)
        if why_kept:
            kept[run.run_id] = why_kept
        else:
            going[run.run_id] = why_going
    if going:
        _keep_parents(experiment, runs, kept, going)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        leaving = [run for run in runs if run.run_id in going]
        usages = list(pool.map(lambda run: usage.measure(run.path), leaving))
    return PrunePlan(
        going=tuple(
            Verdict(run=run, why=going[run.run_id], usage=used) for run, used in zip(leaving, usages, strict=True)
        ),
        kept=tuple(Verdict(run=run, why=kept[run.run_id]) for run in runs if run.run_id in kept),
    )


def _check_arguments(keep_last: int | None, keep_best: int | None, older_than_s: float | None) -> None:
    if keep_last is None and keep_best is None and older_than_s is None:
        raise InvalidInput("say what to keep: at least one of keep_last, keep_best and older_than_s")
    for name, value in (("keep_last", keep_last), ("keep_best", keep_best)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InvalidInput(f"{name}={value!r} must be a whole number of runs, at least 0")
    if older_than_s is not None and not (isinstance(older_than_s, (int, float)) and older_than_s >= 0):
        raise InvalidInput(f"older_than_s={older_than_s!r} must be a number of seconds, such as 30 * 86400")


def _judged(  # noqa: PLR0917  # called once, above
    run: RunInfo,
    place: int,
    keep_last: int | None,
    keep_best: int | None,
    best: dict[str, str],
    older_than_s: float | None,
) -> tuple[str, str]:
    """Return why the run stays, else why it goes."""
    if keep_last is not None and place < keep_last:
        return f"among the newest {keep_last}", ""
    if run.run_id in best:
        return f"among the best {keep_best}: {best[run.run_id]}", ""
    age = datetime.now(UTC) - _last_sign(run)
    if older_than_s is not None and age.total_seconds() < older_than_s:
        return f"touched {_shown(age)} ago", ""
    protection = _protection(run, age)
    if protection:
        return protection, ""
    reasons = [
        f"not among the newest {keep_last}" if keep_last else "",
        f"not among the best {keep_best}" if keep_best else "",
        f"touched {_shown(age)} ago" if older_than_s is not None else "",
    ]
    return "", ", ".join(filter(None, reasons)) or "nothing keeps it"


def _protection(run: RunInfo, age: timedelta) -> str:
    if run.status in {"unknown", "unreadable"}:
        return "not made by runmgr, or its run.json cannot be read"
    place = RunDirectory(run.path)
    if newer := record.newer_format(place):
        return newer
    try:
        pinned = sorted(pins.pinned_objects(place))
    except OSError as error:
        return f"its pins cannot be read: {error.strerror}"
    reasons = {
        f"{run.status}: a status that this runmgr does not know": run.status not in _KNOWN,
        "live": run.status == "running",
        f"pinned: {', '.join(pinned)}": pinned,
        "preempted: its launch may continue it; `runmgr rm` removes it all the same": run.status == "preempted",
        f"{run.status} {_shown(age)} ago: its launch may continue it": run.status != "completed" and age < _SETTLED,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _last_sign(run: RunInfo) -> datetime:
    """Return when the run was last known to do something."""
    texts = [run.created, run.ended, (run.latest or {}).get("saved")]
    moments = [moment for text in texts if (moment := _moment(text)) is not None]
    lease_age_s = record.lease_age_s(RunDirectory(run.path))
    if lease_age_s is not None:
        moments.append(datetime.now(UTC) - timedelta(seconds=lease_age_s))
    return max(moments, default=datetime.now(UTC))


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _shown(age: timedelta) -> str:
    seconds = age.total_seconds()
    for unit, length_s in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


def _best(runs: list[RunInfo], count: int | None, metric: str | None, mode: Mode | None) -> dict[str, str]:
    """Return the best runs, each with what makes it so; ties keep the older."""
    watching = next((run for run in runs if run.monitor and metric in {None, run.monitor}), None)
    metric = metric or (watching.monitor if watching else None)
    if metric is None:
        raise InvalidInput("no run has a monitored metric, so none is best; name a metric")
    sign = 1 if (mode or (watching.mode if watching else "max")) == "min" else -1
    scored = []
    for place, run in enumerate(reversed(runs)):
        values = [value_of(checkpoint, metric) for checkpoint in (run.best, run.latest)]
        finite = [sign * value for value in values if value is not None and math.isfinite(value)]
        if finite:
            scored.append((min(finite), place, run.run_id))
    return {run_id: f"{metric} {sign * value:.6g}" for value, _, run_id in sorted(scored)[:count]}


def _keep_parents(experiment: Experiment, runs: list[RunInfo], kept: dict[str, str], going: dict[str, str]) -> None:
    """Keep what any run that stays was forked from, and what that one was forked from in its turn."""
    waiting: list[tuple[str, Any]] = [(run.run_id, run.parent) for run in runs if run.run_id in kept]
    waiting += _parents_elsewhere(experiment)
    parents = {run.run_id: run.parent for run in runs}
    for child, parent in waiting:  # grows while it is walked
        name = _parent_in(experiment, parent)
        if name in going:
            kept[name] = f"{child} was forked from it"
            del going[name]
            waiting.append((name, parents[name]))


def _parents_elsewhere(experiment: Experiment) -> Iterable[tuple[str, Any]]:
    for name in catalog.list_experiments(experiment.root):
        if name != experiment.name:
            other = Experiment(experiment.root, name)
            with suppress(OSError):  # not ours to look into
                for run_id, content in summary.read_many(other.path, list(catalog.run_ids(other))):
                    if content.get("parent"):
                        yield f"{name}/{run_id}", content["parent"]


def _parent_in(experiment: Experiment, parent: Any) -> str | None:
    """Return the run of `experiment` that a run.json names as its parent; by names, since roots move."""
    if not isinstance(parent, dict) or not isinstance(parent.get("path"), str):
        return None
    run_id = parent.get("run_id")
    folders = Path(parent["path"]).parts
    is_here = any(pair == (experiment.name, run_id) for pair in itertools.pairwise(folders))
    return run_id if is_here else None


def _check_unchanged(planned: RunInfo) -> None:
    now = record.read_json(RunDirectory(planned.path).record_path) or {}
    if any(now.get(name) != getattr(planned, name) for name in ("attempt", "ended", "latest")):
        reason = "it was trained on since the plan was made"
        raise RunProtected(f"run {planned.run_id} stays: {reason}", run_id=planned.run_id, reason=reason)
