"""At which call all ranks shall speak with each other, so that every other call costs no exchange."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from runmgr.errors import AgreementError

if TYPE_CHECKING:
    from collections.abc import Callable

    from runmgr.worker.agreement import Agreement

_LOOK_S = 0.2
_QUICK_LOOK_S = 0.005


class Meeting:
    """Finds one call, the same on all ranks, at which they meet once any of them wants to.

    Every rank counts its calls of `is_due`. A thread on each looks a few times a second whether somebody asked for a
    meeting. If so it holds its rank at the next call and puts down how many calls were made; rank 0 publishes the
    greatest of these numbers plus one, which is where they meet. No rank can be past it: all are held until they know.
    """

    def __init__(self, agreement: Agreement, wants: Callable[[], bool]) -> None:
        self._agreement = agreement
        self._wants = wants
        self._round = 0
        self._calls = 0
        self._is_held = False
        self._at_call = 0
        self._at_call_is_known = threading.Event()
        self._has_met = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if agreement.ranks.world_size > 1:
            self._thread = threading.Thread(target=self._watch, name="runmgr-meeting", daemon=True)
            self._thread.start()

    def is_due(self) -> bool:
        """Count this call and say whether the ranks meet at it. Every rank, equally often, main thread."""
        if self._thread is None:
            return self._wants()
        self._calls += 1  # before looking whether we are held: the thread does it the other way round
        if not self._is_held:
            return False
        known = self._at_call_is_known.wait(self._agreement.timeout_s)
        return not known or self._calls >= self._at_call  # not known: the exchange will name who is missing

    def has_met(self) -> None:
        """Go on to the next one."""
        if self._thread is not None:
            self._is_held = False
            self._at_call_is_known.clear()
            self._has_met.set()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._has_met.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._ended.wait(_LOOK_S):
                if self._wants():
                    self._agreement.post(self._key("asked"), "")
                if self._agreement.look([self._key("asked")]) is not None:
                    self._meet()
        except AgreementError:  # the ranks lost each other, as the exchange at the next call will say
            self._at_call = 0
            self._at_call_is_known.set()
            self._is_held = True

    def _meet(self) -> None:
        ranks = self._agreement.ranks
        self._is_held = True
        self._agreement.post(self._key(f"calls/{ranks.rank}"), str(self._calls))
        if ranks.is_main:
            calls = self._look_until_there([self._key(f"calls/{rank}") for rank in range(ranks.world_size)])
            self._agreement.post(self._key("at"), str(max(map(int, calls), default=0) + 1))
        for at in self._look_until_there([self._key("at")]):
            self._at_call = int(at)
            self._at_call_is_known.set()
            self._has_met.wait()
            self._has_met.clear()
            self._round += 1

    def _look_until_there(self, keys: list[str]) -> list[str]:
        """Return the values, or nothing when the run ends first."""
        while (found := self._agreement.look(keys)) is None:
            if self._ended.wait(_QUICK_LOOK_S):
                return []
        return found

    def _key(self, name: str) -> str:
        return f"meeting/{self._round}/{name}"
