"""Take a checkpoint out of its run: a copy of its own that may be written to, checked byte for byte before it has its name."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING

from runmgr.disk import atomic, checkpoints, integrity
from runmgr.errors import CheckpointNotFound, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runmgr.disk.checkpoints import Checkpoint
    from runmgr.disk.directory import RunDirectory

_LOOKS = 5  # a training may replace the latest checkpoint while it is being opened


def export(
    run: RunDirectory, name: str, target: Path, on_bytes: Callable[[int], object] = lambda _: None
) -> tuple[Path, int]:
    """Copy the checkpoint under a public name to `target`, a file that is not there yet or a directory.

    Returns the new file and its bytes. It shares nothing with the run that a write could change, carries the mode that
    the umask gives, and appears, whole and durable, once its bytes were read again and are those that were saved.
    `on_bytes` hears of each byte twice, once copied and once checked.
    """
    public = run.public_path(name)
    if target.is_dir():
        target /= public.name
    if not target.parent.is_dir():
        raise InvalidInput(f"there is no directory {target.parent} to put {target.name} into")
    if os.path.lexists(target):
        raise InvalidInput(f"{target} is there already; give another name, nothing is overwritten")
    temporary = atomic.temporary_beside(target)
    try:
        entry = _copied(run, public.name, temporary, on_bytes)
        _check(temporary, entry, on_bytes)
        size_bytes = temporary.stat().st_size
        atomic.give_name(temporary, target)
    except FileExistsError:
        raise InvalidInput(f"{target} was made by somebody else meanwhile; nothing is overwritten") from None
    finally:
        atomic.remove(temporary)
    return target, size_bytes


def size_bytes(run: RunDirectory, name: str) -> int:
    """Return how much there is to copy, as far as can be known now."""
    try:
        return run.public_path(name).stat().st_size
    except FileNotFoundError:
        return 0


def _copied(run: RunDirectory, name: str, temporary: Path, on_bytes: Callable[[int], object]) -> Checkpoint | None:
    """Copy what `name` means now; returns its entry, if one of our trainings recorded it."""
    for _ in range(_LOOKS):
        entries = checkpoints.read_all(run)
        entry = next((entry for entry in reversed(entries) if name in (*entry.names, entry.object_name)), None)
        source = run.path / name if entry is None else entry.path_in(run)
        if not source.is_file():
            if entry is None:
                there = sorted({found for known in entries for found in known.names})
                raise CheckpointNotFound(f"run {run.run_id} has no {name}; it has {there}", path=str(run.path / name))
            continue
        try:
            atomic.copy(source, temporary, mode=0o666, on_bytes=on_bytes)
        except FileNotFoundError as error:
            if error.filename != str(source):
                raise
        else:
            return entry
    raise CheckpointNotFound(
        f"{run.path / name} was replaced {_LOOKS} times before it could be read", path=str(run.path)
    )


def _check(temporary: Path, entry: Checkpoint | None, on_bytes: Callable[[int], object]) -> None:
    if entry is not None:
        integrity.check_outline(temporary, size_bytes=entry.size_bytes, expected_digest=entry.digest)
    if entry is not None or zipfile.is_zipfile(temporary):  # another program's file may be of another kind
        integrity.check_content(temporary, on_bytes)
