"""How many bytes runs take on the disk, and how many would be free without them: each file once, whatever its names."""

from __future__ import annotations

import os
import stat
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_BLOCK_BYTES = 512  # what st_blocks counts, on every file system


class Usage(NamedTuple):
    """What lies in a directory: each file's (device, inode) with its bytes and links, and how many of these are in it."""

    files: dict[tuple[int, int], tuple[int, int]]
    seen: Counter[tuple[int, int]]

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk, as `du` says."""
        return sum(size_bytes for size_bytes, _ in self.files.values())


def measure(directory: Path) -> Usage:
    """Look at everything in `directory`, which may change meanwhile; what cannot be looked at is left out."""
    files: dict[tuple[int, int], tuple[int, int]] = {}
    seen: Counter[tuple[int, int]] = Counter()
    for found in _stats(str(directory)):
        key = found.st_dev, found.st_ino
        links = 1 if stat.S_ISDIR(found.st_mode) else found.st_nlink  # a directory's links are those it holds itself
        files[key] = found.st_blocks * _BLOCK_BYTES, links
        seen[key] += 1
    return Usage(files, seen)


def freed_bytes(usages: Iterable[Usage]) -> int:
    """Return what the disk gets back if all of these are deleted: not what has a further link elsewhere, as in a fork."""
    files: dict[tuple[int, int], tuple[int, int]] = {}
    seen: Counter[tuple[int, int]] = Counter()
    for usage in usages:
        files |= usage.files
        seen += usage.seen
    return sum(size_bytes for key, (size_bytes, links) in files.items() if seen[key] >= links)


def _stats(path: str) -> Iterator[os.stat_result]:
    try:
        found = os.lstat(path)
        yield found
        entries = list(os.scandir(path)) if stat.S_ISDIR(found.st_mode) else []
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _stats(entry.path)
            else:
                yield entry.stat(follow_symlinks=False)
        except OSError:  # removed meanwhile
            continue
