"""How much the tests do that can do more: little for whoever waits, all of it in CI, which sets RUNMGR_THOROUGH."""

from __future__ import annotations

import os
from typing import TypeVar

Size = TypeVar("Size")


def size(little: Size, all_of_it: Size) -> Size:
    """Whoever asks is marked `scales` or `long`, so that CI runs it with all of it."""
    return all_of_it if os.environ.get("RUNMGR_THOROUGH") else little
