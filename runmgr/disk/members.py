"""Which checkpoints an average is made of: the best of some runs, certain epochs, or files by name; oldest first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runmgr.disk import checkpoints, references
from runmgr.disk.directory import EPOCH_PREFIX, RunDirectory
from runmgr.errors import CheckpointNotFound, InvalidInput

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from runmgr.disk.catalog import RunInfo
    from runmgr.disk.checkpoints import Checkpoint, Mode


@dataclass(frozen=True)
class Member:
    """A file to average. `digest` is what its run's record says, empty where none does; `run` None for a file by name."""

    path: Path
    run: RunDirectory | None = None
    digest: str = ""
    monitor: str | None = None


def find_runs(given: Sequence[str | os.PathLike[str]], ckpt_root_dir: str | os.PathLike[str] | None) -> list[RunInfo]:
    """Return the runs that references mean, each once, in the order of their ids, which is that of their creation."""
    found = {run.path: run for run in (references.find_run(reference, ckpt_root_dir) for reference in given)}
    return sorted(found.values(), key=lambda run: (run.run_id, run.experiment_name))


def best(runs: Sequence[RunInfo], count: int) -> list[Member]:
    """Return the `count` best checkpoints that the runs still have, all runs together, by the metric that they monitor.

    Fewer when there are fewer; one that a restore found damaged is passed over. Ties go to the older.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInput(f"best={count!r} must be a whole number, at least 1")
    monitor, mode = _one_monitor(runs)
    scored = [
        (entry.metrics[monitor] if mode == "min" else -entry.metrics[monitor], place, entry)
        for place, run in enumerate(runs)
        for entry in checkpoints.ranked(_whole(run), monitor, mode)
    ]
    if not scored:
        raise CheckpointNotFound(
            f"no checkpoint of {_shown(runs)} has the metric {monitor!r}, so none is best; choose by epochs",
            path=str(runs[0].path),
        )
    chosen = sorted(scored, key=lambda item: (item[0], item[1], item[2].order))[:count]
    return [
        _member(runs[place], entry) for _, place, entry in sorted(chosen, key=lambda item: (item[1], item[2].order))
    ]


def of_epochs(runs: Sequence[RunInfo], epochs: Sequence[int]) -> list[Member]:
    """Return each run's checkpoints after these epochs; what is missing is one error that lists what there is."""
    if any(isinstance(epoch, bool) or not isinstance(epoch, int) for epoch in epochs):
        raise InvalidInput(f"epochs={epochs!r} must be whole numbers, such as [10, 15]")
    found: list[Member] = []
    missing: list[str] = []
    for run in runs:
        there = _by_epoch(run)
        found += [there[epoch] for epoch in sorted(set(epochs)) if epoch in there]
        if lacking := sorted(set(epochs) - there.keys()):
            has = f"it has {_listed(sorted(there))}" if there else "it has none"
            missing.append(f"run {run.run_id} has no checkpoint of epoch {_listed(lacking)}; {has}")
    if missing:
        raise CheckpointNotFound(". ".join(missing), path=str(runs[0].path))
    return found


def files(given: Sequence[str | os.PathLike[str]]) -> list[Member]:
    """Return files as they are named; the last one is the newest."""
    found = []
    for name in given:
        path = Path(name).expanduser().absolute()
        if "/" in str(name) and not path.exists():
            raise CheckpointNotFound(f"there is no {path}", path=str(path))
        if not path.is_file():
            hint = "; of a run say which: --best 10 or --epochs 10,15 (best=10, epochs=[10, 15])"
            raise CheckpointNotFound(f"{name} is no checkpoint file{hint}", path=str(path))
        found.append(Member(path))
    return found


def _one_monitor(runs: Sequence[RunInfo]) -> tuple[str, Mode]:
    """Return the metric that all runs monitor, and which way is better."""
    watched = {(run.monitor, run.mode) for run in runs}
    if len(watched) > 1:
        each = ", ".join(f"{run.run_id} {run.monitor!r} ({run.mode})" for run in runs)
        raise InvalidInput(f"the runs do not monitor one metric, so none is the best of all: {each}; choose by epochs")
    ((monitor, mode),) = watched
    if monitor is None:
        raise InvalidInput(f"{_shown(runs)} monitored no metric, so no checkpoint is best; choose by epochs or by file")
    return monitor, "min" if mode == "min" else "max"


def _whole(run: RunInfo) -> list[Checkpoint]:
    books = checkpoints.read_books(RunDirectory(run.path))
    return [
        entry
        for entry in books.entries
        if entry.kind == "checkpoint" and entry.object_name in books.present - books.damaged
    ]


def _by_epoch(run: RunInfo) -> dict[int, Member]:
    """Return the newest checkpoint of each epoch, that with the epoch's own name first; also another program's files."""
    found = {}
    for path in run.path.glob(f"{EPOCH_PREFIX}*.pth"):
        number = path.stem.removeprefix(EPOCH_PREFIX)
        if number.isascii() and number.isdecimal():
            found[int(number)] = Member(path, RunDirectory(run.path), monitor=run.monitor)
    whole = _whole(run)
    for entry in sorted(whole, key=lambda entry: (f"{EPOCH_PREFIX}{entry.epoch}.pth" in entry.names, entry.order)):
        if entry.epoch is not None:
            found[entry.epoch] = _member(run, entry)
    return found


def _member(run: RunInfo, entry: Checkpoint) -> Member:
    directory = RunDirectory(run.path)
    return Member(entry.path_in(directory), directory, entry.digest, run.monitor)


def _shown(runs: Sequence[RunInfo]) -> str:
    return ", ".join(run.run_id for run in runs)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
