"""What run.json says at its beginning: all that a list of runs needs, without decoding what stands behind it.

Packages, uncommitted changes and hosts are most of a record. Its writer puts these fields in front, so looking at a
hundred thousand records decodes a few hundred bytes of each; a record with them elsewhere is decoded whole.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from runmgr.disk import atomic

FIELDS = ("status", "created", "ended", "attempt", "world_size", "monitor", "mode", "tags", "parent", "latest", "best")
UNREADABLE = {"status": "unreadable"}
_NAMES = frozenset(FIELDS)
_BEHIND = b',\n "run_id"'  # in a record as `atomic.dump_json` writes it only a field of the record itself stands so
_ENOUGH_BYTES = 64 << 10
_decode = json.JSONDecoder().raw_decode


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


def _read_whole(path: str) -> dict[str, Any]:
    try:
        value = json.loads(atomic.read_bytes(Path(path)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        return UNREADABLE
    return value if isinstance(value, dict) else UNREADABLE
