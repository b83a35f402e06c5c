"""Tags: words on a run, which anybody may add or take away, also while the run is being trained.

Those of the start stand in run.json, which only the training writes. A later one is an empty file named by it; a file
named `-<tag>` takes one of the start away. So no two processes ever change the same file.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, record
from runmgr.disk.directory import check_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from runmgr.disk.directory import RunDirectory

_AWAY = "-"  # no tag begins with it


def tags_of(run: RunDirectory, content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the run's tags, those of its start (in `content`, its run.json) first, then the later ones, sorted."""
    given = content.get("tags")
    first = dict.fromkeys(map(str, given)) if isinstance(given, list) else {}
    try:
        found = set(os.listdir(run.tags_path))
    except OSError:  # none yet, or not ours to look into
        return tuple(first)
    kept = [tag for tag in first if _AWAY + tag not in found or tag in found]
    return (*kept, *sorted(tag for tag in found if not tag.startswith(_AWAY) and tag not in first))


def add(run: RunDirectory, tags: Iterable[str]) -> tuple[str, ...]:
    """Add tags; returns all that the run has now. Each is there or not, whatever happens in between."""
    names = [check_name(tag, "tag") for tag in tags]
    with record.told_if_gone(run):
        for directory in (run.private_path, run.tags_path):
            directory.mkdir(exist_ok=True)
        for name in names:
            atomic.create_empty(run.tags_path / name)
        if not record.is_there(run):  # it went to the trash, and this is what is made of its path meanwhile
            _take_back(run, names)
            raise record.gone(run)
    return tags_of(run, record.look_at_json(run.record_path))


def _take_back(run: RunDirectory, names: list[str]) -> None:
    for name in names:
        atomic.remove(run.tags_path / name)
    with suppress(OSError):
        for directory in (run.tags_path, run.private_path, run.path):
            directory.rmdir()


def take_away(run: RunDirectory, tags: Iterable[str]) -> tuple[str, ...]:
    """Take tags away, also those of the start; returns all that are left. One that is not there is no error."""
    names = [check_name(tag, "tag") for tag in tags]
    content = record.look_at_json(run.record_path)
    with record.told_if_gone(run):
        for name in names:
            if name in (content.get("tags") or ()):
                run.tags_path.mkdir(exist_ok=True)
                atomic.create_empty(run.tags_path / (_AWAY + name))  # says nothing yet where a later tag says the same
            if run.tags_path.is_dir():
                atomic.remove(run.tags_path / name)
                atomic.sync_directory(run.tags_path)
    return tags_of(run, content)
