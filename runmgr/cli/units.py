"""Sizes as people read them: `12.3 GB`."""

from __future__ import annotations


def shown_bytes(count: float) -> str:
    """Write bytes in the decimal unit that leaves up to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
