"""What run.json says at its beginning: all that a list of runs needs, without decoding what stands behind it.

Packages, uncommitted changes and hosts are most of a record. Its writer puts these fields in front, so looking at a
hundred thousand records decodes a few hundred bytes of each; a record with them elsewhere is decoded whole.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

FIELDS = ("status", "created", "ended", "attempt", "world_size", "monitor", "mode", "tags", "parent", "latest", "best")
UNREADABLE = {"status": "unreadable"}
_NAMES = frozenset(FIELDS)
_BEHIND = b',\n "run_id"'  # in a record as `atomic.dump_json` writes it only a field of the record itself stands so
_ENOUGH_BYTES = 64 << 10
_CHUNK, _SLOW_CHUNK = 64, 8
_SLOW_S = 0.0003
_THREADS = 32
_decode = json.JSONDecoder().raw_decode

OnProgress = Callable[[int, int], object]  # hears how many runs of how many were looked at


def nobody(_done: int, _total: int) -> None:
    """Hear nothing."""


def read(path: str) -> dict[str, Any]:
    """Return at least FIELDS of the record in `path`; nothing where there is none, UNREADABLE where it cannot be read.

    For what only shows runs, where one bad file must not hide the rest.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            content = os.read(descriptor, _ENOUGH_BYTES)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        return _read_whole(path) if error.errno == errno.ESTALE else UNREADABLE
    end = content.find(_BEHIND)
    if end > 0:
        try:
            found, _ = _decode((content[:end] + b"}").decode())
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and found.keys() >= _NAMES:
            return found
    return _read_whole(path)


def read_many(folder: Path, ids: Sequence[str], advance: OnProgress = nobody) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield runs with FIELDS of their records; where a read waits, as on network storage, many are read at once."""
    waits_s = []
    for done, run_id in enumerate(ids[:_CHUNK], start=1):
        begun = time.perf_counter()
        content = read(f"{folder}/{run_id}/run.json")
        waits_s.append(time.perf_counter() - begun)
        yield run_id, content
        advance(done, len(ids))
    is_slow = len(ids) > _CHUNK and sorted(waits_s)[_CHUNK // 2] > _SLOW_S
    size = _SLOW_CHUNK if is_slow else _CHUNK
    chunks = [ids[start : start + size] for start in range(_CHUNK, len(ids), size)]
    done = _CHUNK
    for found in _in_threads(folder, chunks) if is_slow else (_read_chunk(folder, chunk) for chunk in chunks):
        yield from found
        done += len(found)
        advance(done, len(ids))


def _in_threads(folder: Path, chunks: list[Sequence[str]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from pool.map(lambda chunk: _read_chunk(folder, chunk), chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _read_chunk(folder: Path, ids: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(run_id, read(f"{folder}/{run_id}/run.json")) for run_id in ids]


def _read_whole(path: str) -> dict[str, Any]:
    try:
        value = json.loads(atomic.read_bytes(Path(path)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        return UNREADABLE
    return value if isinstance(value, dict) else UNREADABLE


def mapping(value: object) -> dict[str, Any]:
    """Return a JSON object; nothing in place of what is none, since anything may stand in another program's record."""
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    """Return a JSON array; nothing in place of what is none."""
    return value if isinstance(value, list) else []
