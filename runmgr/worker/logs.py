"""One log file a rank and attempt, and TensorBoard on rank 0."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

LOGGER_NAME = "runmgr"
_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"


class Logs:
    """This rank's log file, which its first record makes, fed by the `runmgr` logger and whoever uses `handler`."""

    def __init__(self, path: Path, *, on_console: bool) -> None:
        self.handler = logging.FileHandler(path, delay=True, encoding="utf-8", errors="backslashreplace")
        formatter = logging.Formatter(_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.handler.setFormatter(formatter)
        self.logger = logging.getLogger(f"{LOGGER_NAME}.run")
        self._package = logging.getLogger(LOGGER_NAME)
        self._level = self._package.level
        if self._level == logging.NOTSET:
            self._package.setLevel(logging.INFO)
        self._handlers: list[logging.Handler] = [self.handler]
        if on_console and not logging.getLogger().handlers:  # nobody else would show warnings
            console = logging.StreamHandler(sys.stderr)
            console.setLevel(logging.WARNING)
            console.setFormatter(logging.Formatter("runmgr: %(message)s"))
            self._handlers.append(console)
        for handler in self._handlers:
            self._package.addHandler(handler)

    def close(self) -> None:
        """Take the handlers off again and close the file."""
        for handler in self._handlers:
            self._package.removeHandler(handler)
        logging.getLogger().removeHandler(self.handler)  # the user may have put it there
        self.handler.close()
        self._package.setLevel(self._level)


class TensorBoard:
    """A `SummaryWriter` that is made at its first use; after a restore it first purges the steps to be done again."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.writer, name)

    @property
    def writer(self) -> SummaryWriter:
        """The writer itself; this makes the events file."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._log_dir), purge_step=self._purge_step)
        return self._writer

    def resume_after(self, step: int) -> None:
        """Hide what earlier attempts wrote after `step`, which this attempt does again."""
        self._purge_step = step + 1
        if self._writer is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            event = Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START))
            self._writer._get_file_writer().add_event(event, self._purge_step)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def flush(self) -> None:
        """Hand what was added to the operating system, so that a killed process loses none of it."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the events file, if there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class NoTensorBoard:
    """What ranks other than 0 get: every method is there and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._nothing

    def _nothing(self, *_args: Any, **_options: Any) -> None:
        return None
