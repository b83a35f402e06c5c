"""Are a run's checkpoints whole: each object against its record, each public name against its object."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from runmgr.disk import checkpoints, integrity, record
from runmgr.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runmgr.disk.checkpoints import Checkpoint
    from runmgr.disk.directory import RunDirectory

_LOOKS, _LOOK_AGAIN_S = 10, 0.2


class Checked(NamedTuple):
    """A checkpoint, and what is wrong with it: None when it is whole."""

    checkpoint: Checkpoint
    problem: str | None


def check(
    run: RunDirectory, entries: list[Checkpoint], on_bytes: Callable[[int], object] | None = None
) -> Iterator[Checked]:
    """Judge each of a run's `checkpoints.listed`, also while it is being trained; what it removes meanwhile is left out.

    Sizes, headers and tables of contents are looked at; every byte is read only with `on_bytes`, which hears of each.
    """
    for entry in entries:
        found = _judged(run, entry, on_bytes)
        if found is not None:
            yield found


def _judged(run: RunDirectory, entry: Checkpoint, on_bytes: Callable[[int], object] | None) -> Checked | None:
    problem = _problem(run, entry, on_bytes)
    for _ in range(_LOOKS):  # a save may be between its record and its names
        if problem is None or record.status_of(run, record.look_at_json(run.record_path)) != "running":
            break
        time.sleep(_LOOK_AGAIN_S)
        now = next((other for other in checkpoints.listed(run) if other.object_name == entry.object_name), None)
        if now is None:
            return None
        entry, problem = now, _problem(run, now, on_bytes)
    return Checked(entry, problem)


def _problem(run: RunDirectory, entry: Checkpoint, on_bytes: Callable[[int], object] | None) -> str | None:
    path = entry.path_in(run)
    try:
        if on_bytes is None:
            integrity.check_outline(path, size_bytes=entry.size_bytes, expected_digest=entry.digest)
        else:
            checkpoints.verify(run, entry, on_bytes)
        for name in entry.names:
            public = run.path / name
            if not checkpoints.is_same_content(path, public):
                return f"{public} is missing or holds something else"
            if on_bytes is not None and not path.samefile(public):
                integrity.check_content(public)
    except (CheckpointCorrupt, OSError) as error:
        return str(error)
    return None
