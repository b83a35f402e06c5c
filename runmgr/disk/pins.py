"""Pins: checkpoints that stay whatever `keep` says; anybody may set them, also while the run is being trained.

A pin is an empty file named by the object, beside a public name of its own for that object.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from runmgr.disk import atomic, record
from runmgr.disk.checkpoints import Checkpoint, object_names, read_all
from runmgr.errors import CheckpointNotFound

if TYPE_CHECKING:
    from runmgr.disk.directory import RunDirectory

_PINNED_NAME = re.compile(r"(?:ckpt_pinned_(epoch|step)_(\d+)_)?((\d+)-(\d+)\.pth)")


def pinned_objects(run: RunDirectory) -> set[str]:
    """Return the objects that stay whatever `keep` says."""
    try:
        return {name for name in os.listdir(run.pins_path) if atomic.TEMPORARY not in name}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def pin(run: RunDirectory, name: str) -> Checkpoint:
    """Let a checkpoint stay whatever `keep` says, under a public name of its own; also while the run is being trained."""
    entry = _entry_named(run, name)
    if entry is None:
        raise _no_such_checkpoint(run, name)
    run.pins_path.mkdir(exist_ok=True)
    atomic.create_empty(run.pins_path / entry.object_name)
    try:
        atomic.point_name(run.path / _pinned_name(entry), entry.path_in(run))
        was_quicker = entry.object_name in object_names(run)
    except FileNotFoundError:
        was_quicker = False
    if not was_quicker:  # than the retention of a live run
        _remove(run, entry)
        if not record.is_there(run):  # it went to the trash in this instant; else somebody may be setting a pin
            with suppress(OSError):
                run.pins_path.rmdir()
        raise _no_such_checkpoint(run, name)
    atomic.sync_directory(run.path)
    return entry


def unpin(run: RunDirectory, name: str) -> Checkpoint:
    """Take a pin back; the run's next save removes the file if `keep` says so. The object itself may be gone."""
    entry = _entry_named(run, name) or _pinned_as(run, name)
    if entry is None:
        raise _no_such_checkpoint(run, name)
    _remove(run, entry)
    atomic.sync_directory(run.path)
    return entry


def _remove(run: RunDirectory, entry: Checkpoint) -> None:
    atomic.remove(run.pins_path / entry.object_name)
    atomic.remove(run.path / _pinned_name(entry))


def _entry_named(run: RunDirectory, name: str) -> Checkpoint | None:
    return next(
        (entry for entry in reversed(read_all(run)) if name in (*entry.names, entry.object_name, _pinned_name(entry))),
        None,
    )


def _pinned_as(run: RunDirectory, name: str) -> Checkpoint | None:
    """Make up the entry of a pin whose object is gone, from its public name or its mark."""
    for found in map(_PINNED_NAME.fullmatch, [*os.listdir(run.path), *pinned_objects(run)]):
        if found is not None and name in {found[0], found[3]}:
            counted = {found[1]: int(found[2])} if found[1] else {}
            return Checkpoint(
                attempt=int(found[4]), sequence=int(found[5]), epoch=counted.get("epoch"), step=counted.get("step")
            )
    return None


def _pinned_name(entry: Checkpoint) -> str:
    what = f"epoch_{entry.epoch}" if entry.epoch is not None else f"step_{entry.step}"
    return f"ckpt_pinned_{what}_{entry.object_name}"


def _no_such_checkpoint(run: RunDirectory, name: str) -> CheckpointNotFound:
    there = sorted({found for known in read_all(run) for found in known.names})
    return CheckpointNotFound(f"run {run.run_id} has no {name}; it has {there}", path=str(run.path / name))
