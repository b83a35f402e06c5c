"""Questions to the store that connects the ranks, so that nobody blocks it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import Store  # type: ignore[attr-defined]

_LONGEST_PAUSE_S = 0.05
_ANSWER_S = 20e-6  # what one question costs a store


def wait(
    store: Store, keys: list[str], timeout_s: float, askers: int, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Wait until all keys are there. Asks again and again: `Store.wait` would block the store for other threads.

    The more askers there are, the more seldom each asks, since the store answers one after the other.
    """
    start = time.monotonic()
    meanwhile()
    while not store.check(keys):
        waited_s = time.monotonic() - start
        if waited_s >= timeout_s:
            return False
        time.sleep(min(max(waited_s / 8, askers * _ANSWER_S), _LONGEST_PAUSE_S))
        meanwhile()
    return True


def set_all(store: Store, keys: list[str], value: str) -> None:
    """Put the value under each key."""
    if keys and store.has_extended_api():  # type: ignore[attr-defined]
        store.multi_set(keys, [value] * len(keys))  # type: ignore[attr-defined]
        return
    for key in keys:
        store.set(key, value)


def get_all(store: Store, keys: list[str]) -> list[bytes]:
    """Return what lies under the keys, which are all there; by one question where the store can."""
    if not keys:
        return []
    if store.has_extended_api():  # type: ignore[attr-defined]
        return list(store.multi_get(keys))
    return [store.get(key) for key in keys]
