"""SIGTERM, SIGUSR1 and SIGUSR2 become a flag that the training loop asks for."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preemption:
    """Whether this process was asked to stop. Handlers are set at the first `watch()` and go at `close()`."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] | None = None

    def watch(self) -> None:
        """Set the handlers, once; only the main thread can."""
        if self._previous is not None or threading.current_thread() is not threading.main_thread():
            return
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def close(self) -> None:
        """Put the handlers of before back."""
        for number, previous in (self._previous or {}).items():
            with contextlib.suppress(ValueError):  # not the main thread: the process is ending anyway
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set the flag, then let the handler of before do its part; the default one would end the process."""
        self.received = signal.Signals(number).name
        previous = (self._previous or {}).get(signal.Signals(number))
        if callable(previous):
            previous(number, frame)
