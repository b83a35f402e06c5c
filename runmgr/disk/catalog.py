"""Find runs: list, latest, best, one. Listing a directory finds the newest; only what is shown is opened."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runmgr.disk import directory, record
from runmgr.disk.directory import LATEST_NAME, RUN_PREFIX, Experiment, RunDirectory
from runmgr.errors import InvalidInput, RunNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from runmgr.disk.checkpoints import Mode

_MOST_COMPARED = 1000


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What run.json says of a run, with its status as it looks now. Times are UTC, ISO 8601.

    A run that another program made (super-gradients) has the status "unknown" and no more than its files.
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
    tags: tuple[str, ...] = ()
    record: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain data, without the whole record."""
        content = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "record"
        }
        return content | {"path": str(self.path), "tags": list(self.tags)}


def list_runs(
    experiment_name: str, ckpt_root_dir: str | os.PathLike[str] | None = None, *, limit: int | None = None
) -> list[RunInfo]:
    """Return the runs of an experiment, newest first, at most `limit`; raises RunNotFound without such an experiment."""
    experiment = find_experiment(experiment_name, ckpt_root_dir)
    found: list[RunInfo] = []
    for run_id in run_ids(experiment):
        if limit is not None and len(found) >= limit:
            break
        found.append(_read(experiment, run_id))
    return found


def list_experiments(ckpt_root_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of the experiments under the root, sorted; none when the root is not there."""
    try:
        with os.scandir(directory.resolve_root(ckpt_root_dir)) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except FileNotFoundError:
        return []


def get_run(
    experiment_name: str, run_id: str | None = None, ckpt_root_dir: str | os.PathLike[str] | None = None
) -> RunInfo:
    """Return one run, by default the latest that has a checkpoint; raises RunNotFound."""
    experiment = find_experiment(experiment_name, ckpt_root_dir)
    chosen = run_id if run_id is not None else get_latest_run_id(experiment_name, ckpt_root_dir)
    if chosen is None:
        raise RunNotFound(f"no run of {experiment.path} has a {LATEST_NAME}", path=str(experiment.path))
    directory.check_name(chosen, "run id")
    if not experiment.run(chosen).path.is_dir():
        raise run_not_found(experiment, chosen)
    return _read(experiment, chosen)


def best_run(
    experiment_name: str,
    metric: str | None = None,
    *,
    mode: Mode | None = None,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
) -> RunInfo:
    """Return the run whose best or latest checkpoint has the best value of `metric`; raises RunNotFound if none has it.

    Without `metric` it is the one that the newest run with a monitored metric watches; without `mode` the one of the
    newest run that watches this metric, else "max".
    """
    from runmgr.disk.checkpoints import is_better

    if mode not in {"max", "min", None}:
        raise InvalidInput(f"mode={mode!r} must be 'max' or 'min'")
    runs = list_runs(experiment_name, ckpt_root_dir)
    watching = next((run for run in runs if run.monitor and metric in {None, run.monitor}), None)
    path = find_experiment(experiment_name, ckpt_root_dir).path
    if metric is None:
        if watching is None:
            raise RunNotFound(
                f"no run in {path} has a monitored metric, so none is best; name a metric", path=str(path)
            )
        metric = watching.monitor
    if mode is None:
        mode = "min" if watching is not None and watching.mode == "min" else "max"
    best, best_value = None, None
    for info in reversed(runs):  # ties keep the older
        for checkpoint in (info.best, info.latest):
            value = _number((checkpoint or {}).get("metrics", {}).get(metric))
            if is_better(value, best_value, mode):
                best, best_value = info, value
    if best is None:
        raise RunNotFound(f"no run of {path} has saved a checkpoint with the metric {metric!r}", path=str(path))
    return best


def get_latest_run_id(
    experiment_name: str,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    *,
    checkpoints_root_dir: str | os.PathLike[str] | None = None,
) -> str | None:
    """Return the newest run that has a `ckpt_latest.pth`, or None; `checkpoints_root_dir` is super-gradients' word."""
    root = directory.resolve_root(ckpt_root_dir if ckpt_root_dir is not None else checkpoints_root_dir)
    path = os.path.join(root, directory.check_name(experiment_name, "experiment name"))
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    newest = max(names, default="")  # the common case, without a look at the others
    if newest.startswith(RUN_PREFIX) and os.path.exists(os.path.join(path, newest, LATEST_NAME)):
        return newest
    runs = sorted((name for name in names if name.startswith(RUN_PREFIX)), reverse=True)
    return next((name for name in runs if os.path.exists(os.path.join(path, name, LATEST_NAME))), None)


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
    """Yield the ids of an experiment's runs, newest first, from one listing."""
    try:
        names = os.listdir(experiment.path)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from sorted((name for name in names if directory.is_run_id(name)), reverse=True)


def find_experiment(experiment_name: str, ckpt_root_dir: str | os.PathLike[str] | None) -> Experiment:
    """Return the experiment's directory, or raise RunNotFound with the nearest names there are."""
    root = directory.resolve_root(ckpt_root_dir)
    experiment = Experiment(root, directory.check_name(experiment_name, "experiment name"))
    if not experiment.path.is_dir():
        others = list_experiments(root)
        raise RunNotFound(
            f"there is no experiment {experiment_name!r} in {root}{nearest(experiment_name, others)}",
            path=str(experiment.path),
        )
    return experiment


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


def _read(experiment: Experiment, run_id: str) -> RunInfo:
    run = RunDirectory(experiment.path / run_id)
    content = record.look_at_json(run.record_path)

    def text(name: str) -> str | None:
        return value if isinstance(value := content.get(name), str) else None

    def number(name: str) -> int | None:
        return value if isinstance(value := content.get(name), int) else None

    def mapping(name: str) -> dict[str, Any] | None:
        return value if isinstance(value := content.get(name), dict) else None

    tags = content.get("tags")
    return RunInfo(
        run_id=run_id,
        experiment_name=experiment.name,
        path=run.path,
        status=record.status_of(run, content),
        created=text("created"),
        ended=text("ended"),
        attempt=number("attempt"),
        world_size=number("world_size"),
        monitor=text("monitor"),
        mode=text("mode"),
        latest=mapping("latest"),
        best=mapping("best"),
        tags=tuple(map(str, tags)) if isinstance(tags, list) else (),
        record=content,
    )


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
