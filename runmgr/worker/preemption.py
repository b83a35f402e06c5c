"""SIGTERM, SIGUSR1, SIGUSR2 and the end of a job's time become a flag that the training loop asks for."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from runmgr import ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_MARGIN_S = 60.0
_MARGIN_SHARE = 0.1  # of the time that was left at the beginning: short jobs keep most of it
_LOST_WORKER = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")


def ignore_stop_signals(worker_id: int = 0) -> None:  # noqa: ARG001  # what a DataLoader calls it with
    """Let this child process outlast the signals that ask a training to stop: for `DataLoader(worker_init_fn=…)`.

    torchrun and Slurm send them to every process. Workers that end with them take the training along before it can save. One
    that is just starting still does; `persistent_workers=True` starts them once.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Preemption:
    """Whether this process was asked to stop. Handlers are set at the first `watch()` and go at `close()`."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._job_end: float | None = None
        self._margin_s = 0.0
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] | None = None

    def watch(self) -> None:
        """Set the handlers, once; only the main thread can."""
        if self._previous is not None or threading.current_thread() is not threading.main_thread():
            return
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._job_end = ranks.job_end()
        if self._job_end is not None:
            self._margin_s = min(_MARGIN_S, _MARGIN_SHARE * max(0.0, self._job_end - time.time()))

    def reason(self, save_s: float = 0.0) -> str | None:
        """Why to stop now, or None: a signal, or so little time left that a save of `save_s` seconds just fits twice."""
        if self.received is not None or self._job_end is None:
            return self.received
        left_s = self._job_end - time.time()
        return f"notice that the job's time ends in {left_s:.0f} s" if left_s < self._margin_s + 2 * save_s else None

    def explain(self, error: BaseException | None) -> None:
        """Add to an error what to do about it, where the signal ended the workers of a DataLoader."""
        if error is not None and self.received is not None and _LOST_WORKER.search(str(error)):
            error.add_note(
                f"{self.received} went to the workers of the DataLoader as well, and the training ended with them; with "
                f"DataLoader(worker_init_fn=runmgr.ignore_stop_signals) they outlast it until the training has saved"
            )

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
