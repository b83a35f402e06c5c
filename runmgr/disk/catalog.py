"""Find runs: list, latest, best, one. Listing a directory finds the newest; only what is shown is opened."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from runmgr.disk import directory, record, summary
from runmgr.disk import tags as tagging
from runmgr.disk.directory import LATEST_NAME, RUN_PREFIX, Experiment, RunDirectory
from runmgr.disk.metrics import is_better, metric_names, value_of
from runmgr.disk.summary import OnProgress, nobody
from runmgr.errors import InvalidInput, RunNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from runmgr.disk.checkpoints import Mode
    from runmgr.disk.filters import Filter

_MOST_COMPARED = 1000
_MOST_ASKED = 50
_T = TypeVar("_T")

_MOST_COMPARED = 1000


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What run.json says of a run, with its status as it looks now. Times are UTC, ISO 8601.

    `latest` and `best` sum up those checkpoints; `parent` says what a fork began from. The status is running, completed,
    failed, interrupted, preempted or lost (it says running, but its writer shows no sign of life). A run that another
    program made (super-gradients) is "unknown" and has no more than its files; one whose run.json is damaged or may not be
    read is "unreadable".
    """

    run_id: str
    experiment_name: str
    path: Path
    status: str
    created: str | None = None
    ended: str | None = None
    attempt: int | None = None
    world_size: int | None = None
    monitor: str | None = None
    mode: str | None = None
    latest: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    parent: dict[str, Any] | None = None
    tags: tuple[str, ...] = ()

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The whole of run.json, read when it is first asked for."""
        return record.look_at_json(RunDirectory(self.path).record_path)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the first attempt, read when it is first asked for."""
        return record.look_at_json(RunDirectory(self.path).config_path)

    @property
    def drift(self) -> dict[str, Any]:
        """What differs between the newest attempt and the one before, as pairs [before, now]."""
        found = record.newest_record(RunDirectory(self.path)).get("drift")
        return found if isinstance(found, dict) else {}

    @property
    def first_failure(self) -> dict[str, Any] | None:
        """Which rank failed first: what the reports of the newest attempt say by now, else what run.json says."""
        from runmgr.disk import failures

        place = RunDirectory(self.path)
        found = failures.first(place, record.newest_record(place))
        if found is None and self.status == "lost":
            found = failures.unheard(self.attempt or 0)
        known = self.record.get("first_failure")
        return found or (known if isinstance(known, dict) else None)

    def log_paths(self, rank: int = 0) -> list[Path]:
        """Return one rank's log files, one an attempt, oldest first; none when it has logged nothing."""
        return [path for owner, path in RunDirectory(self.path).logs() if owner == rank]

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return content | {"path": str(self.path), "tags": list(self.tags)}


def list_runs(
    experiment_name: str,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    status: str | Iterable[str] = (),
    tags: str | Iterable[str] = (),
    where: str | Iterable[str] = (),
    newer_than_s: float | None = None,
    older_than_s: float | None = None,
) -> list[RunInfo]:
    """Return the runs of an experiment, newest first, at most `limit`; raises RunNotFound without such an experiment.

    status         only runs with one of these
    tags           only runs with all of these
    where          only runs of which all these hold, such as "val/accuracy>0.9" or "epoch>=10", for their best or their
                   latest checkpoint
    newer_than_s, older_than_s    only runs that were made less, or more, than so many seconds ago, by their ids
    """
    from runmgr.disk.filters import Filter

    wanted = Filter.of(status=status, tags=tags, where=where, newer_than_s=newer_than_s, older_than_s=older_than_s)
    return list(find(experiment_name, ckpt_root_dir, wanted, limit=limit))


def find(
    experiment_name: str,
    ckpt_root_dir: str | os.PathLike[str] | None,
    wanted: Filter,
    *,
    limit: int | None = None,
    advance: OnProgress = nobody,
) -> Iterator[RunInfo]:
    """Yield the runs that are wanted, newest first, at most `limit`; `advance` hears how many of how many were looked at."""
    experiment = Experiment(
        directory.resolve_root(ckpt_root_dir), directory.check_name(experiment_name, "experiment name")
    )
    if wanted.lets_all_through:
        yield from look(experiment, newest_ids(experiment, limit), advance)
        return
    ids = [run_id for run_id in newest_ids(experiment) if wanted.accepts_id(run_id)]
    found = 0
    for run in look(experiment, ids, advance):
        if limit is not None and found >= limit:
            return
        if wanted.accepts(run):
            found += 1
            yield run


def look(experiment: Experiment, ids: Sequence[str], advance: OnProgress = nobody) -> Iterator[RunInfo]:
    """Yield what the records of these runs say, in order; those that are gone by now are left out."""
    folder = experiment.path
    for run_id, content in summary.read_many(folder, ids, advance):
        if (run := _info(folder, run_id, content)) is not None:
            yield run


def list_experiments(ckpt_root_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of the experiments under the root, sorted; none when the root is not there."""
    try:
        with os.scandir(directory.resolve_root(ckpt_root_dir)) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_directory(entry))
    except FileNotFoundError:
        return []


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, or a place that is not ours to look at
        return False


def get_run(
    experiment_name: str, run_id: str | None = None, ckpt_root_dir: str | os.PathLike[str] | None = None
) -> RunInfo:
    """Return one run, by default the latest that has a checkpoint; raises RunNotFound."""
    experiment = find_experiment(experiment_name, ckpt_root_dir)
    chosen = run_id if run_id is not None else get_latest_run_id(experiment_name, ckpt_root_dir)
    if chosen is None:
        hint = f"{experiment_name}@-1 means its newest, with or without one"
        raise RunNotFound(f"no run of {experiment.path} has a {LATEST_NAME}; {hint}", path=str(experiment.path))
    directory.check_name(chosen, "run id")
    for run in look(experiment, [chosen]):
        return run
    raise run_not_found(experiment, chosen)


def best_run(
    experiment_name: str,
    metric: str | None = None,
    *,
    mode: Mode | None = None,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunInfo:
    """Return the run whose best or latest checkpoint has the best value of `metric`; raises RunNotFound if none has it.

    Without `metric` it is the one that the newest run with a monitored metric watches; without `mode` the one of the
    newest run that watches this metric, else "max". `on_progress` gets how many runs of how many were looked at.
    """
    if mode not in {"max", "min", None}:
        raise InvalidInput(f"mode={mode!r} must be 'max' or 'min'")
    experiment = find_experiment(experiment_name, ckpt_root_dir)
    ids = newest_ids(experiment)
    if metric is None or mode is None:
        watching = next((run for run in look(experiment, ids) if run.monitor and metric in {None, run.monitor}), None)
        metric = metric or (watching.monitor if watching else None)
        mode = mode or ("min" if watching and watching.mode == "min" else "max")
    path = experiment.path
    if metric is None:
        raise RunNotFound(f"no run in {path} has a monitored metric, so none is best; name a metric", path=str(path))
    best, best_value = None, None
    for run_id, content in summary.read_many(experiment.path, ids[::-1], on_progress or nobody):  # ties keep the older
        for checkpoint in (content.get("best"), content.get("latest")):
            value = value_of(checkpoint, metric)
            if is_better(value, best_value, mode):
                best, best_value = run_id, value
    if best is None:
        known = newest_metrics(experiment)
        near = nearest(metric, sorted(known)) if known else "; none of the newest has any metric"
        raise RunNotFound(f"no run of {path} has saved a checkpoint with the metric {metric!r}{near}", path=str(path))
    return get_run(experiment_name, best, ckpt_root_dir)


def newest_metrics(experiment: Experiment) -> set[str]:
    """Return the names of the metrics that an experiment's newest runs have saved."""
    newest = look(experiment, newest_ids(experiment, _MOST_ASKED))
    return {name for run in newest for name in metric_names(run.best, run.latest)}


def get_latest_run_id(
    experiment_name: str,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    *,
    checkpoints_root_dir: str | os.PathLike[str] | None = None,
) -> str | None:
    """Return the newest run that has a `ckpt_latest.pth`, or None; `checkpoints_root_dir` is super-gradients' word."""
    given = ckpt_root_dir if ckpt_root_dir is not None else checkpoints_root_dir
    root = os.fspath(given) if given is not None else ""
    if (
        not root.startswith("/") or "\0" in root
    ):  # else it is resolved, and the answer comes in little more than a listing
        root = str(directory.resolve_root(given))
    path = f"{root}/{directory.check_name(experiment_name, 'experiment name')}"
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    newest = max(names, default="")  # the common case, without a look at the others
    if newest.startswith(RUN_PREFIX) and os.path.exists(f"{path}/{newest}/{LATEST_NAME}"):
        return newest
    runs = sorted((name for name in names if name.startswith(RUN_PREFIX)), reverse=True)
    return next((name for name in runs if os.path.exists(f"{path}/{name}/{LATEST_NAME}")), None)


def get_checkpoints_dir_path(
    experiment_name: str,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    run_id: str | None = None,
    *,
    checkpoints_root_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Return the directory of a run, or of the experiment without `run_id`, as super-gradients' function does.

    Unlike there nothing is created, and a run that does not exist is RunNotFound.
    """
    root = directory.resolve_root(ckpt_root_dir if ckpt_root_dir is not None else checkpoints_root_dir)
    experiment = Experiment(root, directory.check_name(experiment_name, "experiment name"))
    if run_id is None:
        return str(experiment.path)
    directory.check_name(run_id, "run id")
    if not experiment.run(run_id).path.is_dir():
        raise run_not_found(experiment, run_id)
    return str(experiment.run(run_id).path)


def run_ids(experiment: Experiment) -> Iterator[str]:
    """Yield the ids of an experiment's runs, newest first, from one listing; none where it is not there."""
    try:
        yield from newest_ids(experiment)
    except RunNotFound:
        return


def newest_ids(experiment: Experiment, limit: int | None = None) -> list[str]:
    """Return the ids of an experiment's newest runs, newest first, from one listing; raises RunNotFound without it."""
    try:
        names = os.listdir(experiment.path)
    except (FileNotFoundError, NotADirectoryError):
        raise _experiment_not_found(experiment) from None
    if limit is not None:
        newest = heapq.nlargest(limit, names)
        if all(map(directory.is_run_id, newest)):  # seldom is there anything else, and so far up
            return newest
    return sorted(filter(directory.is_run_id, names), reverse=True)[:limit]


def find_experiment(experiment_name: str, ckpt_root_dir: str | os.PathLike[str] | None) -> Experiment:
    """Return the experiment's directory, or raise RunNotFound with the nearest names there are."""
    root = directory.resolve_root(ckpt_root_dir)
    experiment = Experiment(root, directory.check_name(experiment_name, "experiment name"))
    if not experiment.path.is_dir():
        raise _experiment_not_found(experiment)
    return experiment


def _experiment_not_found(experiment: Experiment) -> RunNotFound:
    near = nearest(experiment.name, list_experiments(experiment.root))
    return RunNotFound(
        f"there is no experiment {experiment.name!r} in {experiment.root}{near}", path=str(experiment.path)
    )


def run_not_found(experiment: Experiment, run_id: str) -> RunNotFound:
    """Return the error for a run that is not there, with the nearest ids there are."""
    near = nearest(run_id, list(run_ids(experiment)))
    return RunNotFound(f"there is no run {run_id!r} in {experiment.path}{near}", path=str(experiment.run(run_id).path))


def nearest(name: str, others: list[str], shown: Callable[[str], str] = str) -> str:
    """Return the end of an error about a name that is not there: those most like it, else the first few there are."""
    import difflib

    near = difflib.get_close_matches(name, others[:_MOST_COMPARED], n=3)
    if near:
        return f"; did you mean {' or '.join(map(shown, near))}?"
    return (
        f"; there are {', '.join(map(shown, others[:5]))}{', …' if len(others) > 5 else ''}"
        if others
        else "; it is empty"
    )


def _info(folder: Path, run_id: str, content: dict[str, Any]) -> RunInfo | None:
    """Return what the record of a run in an experiment's folder says; None when there is no such directory."""
    path = folder / run_id
    if not content and not path.is_dir():
        return None

    def typed(name: str, kind: type[_T]) -> _T | None:
        return value if isinstance(value := content.get(name), kind) else None

    return RunInfo(
        run_id=run_id,
        experiment_name=folder.name,
        path=path,
        status=record.status_of(RunDirectory(path), content),
        created=typed("created", str),
        ended=typed("ended", str),
        attempt=typed("attempt", int),
        world_size=typed("world_size", int),
        monitor=typed("monitor", str),
        mode=typed("mode", str),
        latest=typed("latest", dict),
        best=typed("best", dict),
        parent=typed("parent", dict),
        tags=tagging.tags_of(RunDirectory(path), content),
    )
