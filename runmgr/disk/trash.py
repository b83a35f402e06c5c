"""The trash: where removed runs lie until they are restored or purged, in `<experiment>/.runmgr/trash/`.

Going there and coming back is one rename, so a run is whole in one place or the other. Whoever moves a run does what a
training does that continues it: takes its lease and its next attempt number. So of the two exactly one goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from runmgr.disk import atomic, catalog, claiming, directory, pins, record, usage
from runmgr.disk import lease as leases
from runmgr.disk.directory import Experiment, RunDirectory
from runmgr.errors import InvalidInput, RunNotFound, RunProtected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from runmgr.disk.catalog import RunInfo

_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST}
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrashedRun:
    """A run in the trash, and since when (UTC, ISO 8601, by the file system's clock). Bytes as `du` counts them."""

    run: RunInfo
    removed: str
    usage: usage.Usage = dataclasses.field(repr=False)

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""
        return self.usage.size_bytes


def discard(run: RunDirectory, check: Callable[[], object] = lambda: None) -> Path:
    """Move a run to the trash and return where it lies now. Raises RunBusy while somebody trains in it.

    `check` is called when nobody can begin to train in it any more, and stops it all by raising. A run with a pin is
    RunProtected, also if that was set at the last moment.
    """
    if run.path.is_symlink():
        raise InvalidInput(f"{run.path} is a symbolic link; what it points to is not in this experiment, so move that")
    experiment = run.experiment
    if experiment.root.name == experiment.trash_path.parent.name:
        raise InvalidInput(f"{run.path} is in the trash already; `runmgr purge` deletes it for good")
    moved = RunDirectory(experiment.trash_path / run.run_id)
    with record.told_if_gone(run), _held(run):
        check()
        _check_pins(run)
        claiming.remember_last(experiment)
        experiment.trash_path.mkdir(exist_ok=True)
        try:
            atomic.move_directory(run.path, moved.path)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            raise InvalidInput(
                f"a run {run.run_id} lies in the trash of {experiment.path} already; `runmgr purge` or rename that one"
            ) from None
        try:
            _check_pins(moved)
        except RunProtected:
            restore(experiment, run.run_id)
            raise
        with suppress(OSError):  # restore does it as well
            _forget_removal(moved)
    return moved.path


def restore(experiment: Experiment, run_id: str) -> RunDirectory:
    """Bring a run back from the trash, as it was."""
    trashed, run = RunDirectory(experiment.trash_path / run_id), experiment.run(directory.check_name(run_id, "run id"))
    occupied = InvalidInput(f"there is a run {run_id} in {experiment.path} already; rename or remove that one")
    leases.remove_husk(run)
    if os.path.lexists(run.path) and trashed.path.is_dir():
        raise occupied
    try:
        _forget_removal(trashed)
        atomic.move_directory(trashed.path, run.path)
    except FileNotFoundError:
        near = catalog.nearest(run_id, list(trashed_ids(experiment)))
        raise RunNotFound(
            f"the trash of {experiment.path} holds no run {run_id!r}{near}", path=str(trashed.path)
        ) from None
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise occupied from None
    return run


def trashed_ids(experiment: Experiment) -> Iterator[str]:
    """Yield the ids of the runs in the trash, newest first."""
    try:
        names = os.listdir(experiment.trash_path)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from sorted(filter(directory.is_run_id, names), reverse=True)


def list_trash(experiment_name: str, ckpt_root_dir: str | os.PathLike[str] | None = None) -> list[TrashedRun]:
    """Return the runs in an experiment's trash, newest first; raises RunNotFound without such an experiment."""
    experiment = catalog.find_experiment(experiment_name, ckpt_root_dir)
    found = []
    for run_id in trashed_ids(experiment):
        with suppress(FileNotFoundError):  # restored or purged meanwhile
            path = experiment.trash_path / run_id
            when = datetime.fromtimestamp(path.stat().st_ctime, UTC).isoformat()
            info = catalog.get_run(path.parent.name, run_id, path.parent.parent)
            info = dataclasses.replace(info, experiment_name=experiment.name)
            found.append(TrashedRun(run=info, removed=when, usage=usage.measure(path)))
    return found


def purge_trash(
    experiment_name: str, run_ids: Iterable[str] | None = None, ckpt_root_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """Delete runs in the trash for good, by default all; returns their ids. Nothing but the trash is touched.

    One that was killed half-way is finished by the next. A run that is being deleted is in the trash no more, so no part
    of a run is ever restored.
    """
    experiment = catalog.find_experiment(experiment_name, ckpt_root_dir)
    chosen = list(trashed_ids(experiment)) if run_ids is None else list(run_ids)
    _delete_leftovers(experiment)
    purged = []
    for run_id in chosen:
        path = experiment.trash_path / directory.check_name(run_id, "run id")
        if not path.is_dir():
            if run_ids is None:  # restored or purged meanwhile
                continue
            near = catalog.nearest(run_id, list(trashed_ids(experiment)))
            raise RunNotFound(f"the trash of {experiment.path} holds no run {run_id!r}{near}", path=str(path))
        experiment.purging_path.mkdir(exist_ok=True)
        aside = experiment.purging_path / f"{run_id}-{os.urandom(4).hex()}"
        with suppress(FileNotFoundError):
            atomic.move_directory(path, aside)
            _delete(aside)
            purged.append(run_id)
    return purged


def _delete_leftovers(experiment: Experiment) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(experiment.purging_path):
            _delete(experiment.purging_path / name)


def _delete(path: Path) -> None:
    """Delete a directory with all that is in it, also while another process does the same."""
    while os.path.lexists(path):
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def _check_pins(run: RunDirectory) -> None:
    pinned = sorted(pins.pinned_objects(run))
    if pinned:
        reason = f"{len(pinned)} of its checkpoints {'is' if len(pinned) == 1 else 'are'} pinned ({', '.join(pinned)})"
        raise RunProtected(f"run {run.run_id} stays: {reason}; `runmgr unpin` first", run_id=run.run_id, reason=reason)


@contextmanager
def _held(run: RunDirectory) -> Iterator[None]:
    """Hold the run as a training does that continues it, until the block has moved it or failed."""
    record.check_format(run)
    lease = leases.Lease(run)
    try:
        lease.acquire(takes_over=False)
        claim = record.Attempt.begin(run, {"status": record.REMOVING} | lease.facts(), after=lease.after).number
    except OSError as error:
        lease.release()
        if error.errno not in _FULL:
            raise
        claim = leases.claim_without_a_byte(run)
    except BaseException:
        lease.release()
        raise
    try:
        yield
    except BaseException:
        atomic.remove(run.attempt_path(claim))
        raise
    finally:
        lease.release()


def _forget_removal(run: RunDirectory) -> None:
    """Remove the marks of those who moved a run, so that it comes back as it was."""
    for number in reversed(record.attempt_numbers(run)):
        path = run.attempt_path(number)
        is_empty = path.exists() and not path.stat().st_size  # claimed on a full disk
        if not is_empty and record.look_at_json(path).get("status") != record.REMOVING:
            break
        atomic.remove(path)
    atomic.remove(run.lease_path)
