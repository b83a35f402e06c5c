"""A forked process that tells its parent things while it runs; it has torch from the start, so it costs milliseconds."""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Child:
    """Runs `function(told, *args)`; what it tells comes out of `text`, the trace of what it raises as well."""

    def __init__(self, function: Callable[..., Any], *args: Any, enter: Callable[[], None] = lambda: None) -> None:
        self._reading, writing = os.pipe()
        self.text = ""
        self.pid = os.fork()
        if not self.pid:
            try:
                enter()
                function(lambda text: os.write(writing, text.encode()), *args)
            except BaseException:  # noqa: BLE001  # the parent judges
                os.write(writing, traceback.format_exc().encode())
            finally:
                os._exit(0)
        os.close(writing)

    def read_until(self, enough: Callable[[str], bool], timeout_s: float = 240.0) -> str:
        """Return what was told once that is enough."""
        deadline = time.monotonic() + timeout_s
        while not enough(self.text):
            assert select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))[0], self.text
            part = os.read(self._reading, 1 << 16)
            assert part, self.text
            self.text += part.decode()
        return self.text

    def read_rest(self, timeout_s: float = 240.0) -> str:
        """Return what was told once the process ends."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))[0], self.text
            part = os.read(self._reading, 1 << 16)
            if not part:
                return self.text
            self.text += part.decode()

    def end(self) -> None:
        """Kill -9, whatever it is doing; once."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._reading)
            self.pid = 0
