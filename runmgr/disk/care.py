"""Care for runs: what `runmgr tag`, `pin`, `export`, `verify`, `rm` and `restore` do, as calls; a run is meant as there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from runmgr.disk import catalog, checkpoints, directory, exporting, pins, references, tags, trash, verification
from runmgr.disk.directory import Experiment, RunDirectory
from runmgr.errors import InvalidInput, RunNotFound

if TYPE_CHECKING:
    from runmgr.disk.catalog import RunInfo
    from runmgr.disk.checkpoints import Checkpoint
    from runmgr.disk.verification import Checked

_COUNTED = re.compile(r"@-?\d+$")
_Path = str | os.PathLike[str]


def tag_run(run: _Path, *words: str, ckpt_root_dir: _Path | None = None) -> tuple[str, ...]:
    """Add tags to a run, also while it is being trained; returns all that it has then."""
    return tags.add(_found(run, ckpt_root_dir), words)


def untag_run(run: _Path, *words: str, ckpt_root_dir: _Path | None = None) -> tuple[str, ...]:
    """Take tags away from a run, also those that it was started with; returns all that are left."""
    return tags.take_away(_found(run, ckpt_root_dir), words)


def pin_checkpoint(run: _Path, name: str = "latest", *, ckpt_root_dir: _Path | None = None) -> Checkpoint:
    """Let a checkpoint stay whatever `Keep` says, and its run whatever is pruned or removed."""
    found = _found(run, ckpt_root_dir)
    return pins.pin(found, found.public_path(name).name)


def unpin_checkpoint(run: _Path, name: str = "latest", *, ckpt_root_dir: _Path | None = None) -> Checkpoint:
    """Take a pin back."""
    found = _found(run, ckpt_root_dir)
    return pins.unpin(found, found.public_path(name).name)


def export_checkpoint(run: _Path, target: _Path, name: str = "latest", *, ckpt_root_dir: _Path | None = None) -> Path:
    """Copy a checkpoint to `target`, a new file or a directory, to be changed at will; returns the file.

    It appears whole, durable and checked byte for byte, or not at all; nothing is overwritten.
    """
    path, _ = exporting.export(_found(run, ckpt_root_dir), name, Path(target).expanduser().absolute())
    return path


def verify_run(run: _Path, *, deep: bool = False, ckpt_root_dir: _Path | None = None) -> list[Checked]:
    """Say of each checkpoint of a run whether it is whole; every byte is read only with `deep`."""
    found = _found(run, ckpt_root_dir)
    return list(verification.check(found, checkpoints.listed(found), (lambda _: None) if deep else None))


def remove_run(run: _Path, *, ckpt_root_dir: _Path | None = None) -> Path:
    """Move a run to its experiment's trash, in one step; returns where it lies there.

    Raises RunBusy while somebody trains in it (that takes up to 5 s to see; 35 s where its writer died on another host)
    and RunProtected while something in it is pinned. An experiment's bare name, or the path of a file in the run, is not
    enough to mean it here.
    """
    return trash.discard(RunDirectory(run_to_remove(run, ckpt_root_dir).path))


def run_to_remove(run: _Path, ckpt_root_dir: _Path | None = None) -> RunInfo:
    """Return the run that is meant, unless another thing may be meant just as well."""
    found = references.find_run(run, ckpt_root_dir)
    text = os.fspath(run).rstrip("/")
    last = text.rpartition("/")[2]
    if last == found.run_id or last in {"latest", "best"} or _COUNTED.search(last):
        return found
    raise InvalidInput(
        f"{text!r} means the run {found.run_id} elsewhere; to remove that, say {found.experiment_name}/{found.run_id}"
    )


def restore_run(run: str, *, ckpt_root_dir: _Path | None = None) -> RunInfo:
    """Bring a run back from the trash, as it was; `run` is its id, alone or behind its experiment and a slash."""
    experiment, run_id = trashed(run, ckpt_root_dir)
    trash.restore(experiment, run_id)
    return catalog.get_run(experiment.name, run_id, experiment.root)


def trashed(run: str, ckpt_root_dir: _Path | None = None) -> tuple[Experiment, str]:
    """Return the experiment whose trash holds the run that is meant, and its id; raises RunNotFound."""
    root = directory.resolve_root(ckpt_root_dir)
    text = os.fspath(run).rstrip("/")
    name, _, run_id = text.rpartition("/")
    directory.check_name(run_id, "run id")
    names = [directory.check_name(name, "experiment name")] if name else catalog.list_experiments(root)
    for experiment in (Experiment(root, name) for name in names):
        if (experiment.trash_path / run_id).is_dir():
            return experiment, run_id
    if name:
        experiment = catalog.find_experiment(name, root)
        near = catalog.nearest(run_id, list(trash.trashed_ids(experiment)))
        raise RunNotFound(
            f"the trash of {experiment.path} holds no run {run_id!r}{near}", path=str(experiment.trash_path)
        )
    raise RunNotFound(
        f"no experiment in {root} has a run {run_id} in its trash; `runmgr purge EXPERIMENT` lists what is there",
        path=str(root),
    )


def _found(run: _Path, ckpt_root_dir: _Path | None) -> RunDirectory:
    return RunDirectory(references.find_run(run, ckpt_root_dir).path)
