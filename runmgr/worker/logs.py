"""One log file a rank and attempt, and TensorBoard on rank 0."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

LOGGER_NAME = "runmgr"
_TAIL_LINES, _LINE_LIMIT = 50, 2000
_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"


class Logs:
    """This rank's log file, which its first record makes, fed by the `runmgr` logger and whoever uses `handler`."""

    def __init__(self, path: Path, *, on_console: bool) -> None:
        self.handler = _LogFile(path, delay=True, encoding="utf-8", errors="backslashreplace")
        self.tail = self.handler.tail
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
        with suppress(OSError):  # a full disk: it has complained, and must not hide the training's own error
            self.handler.close()
        self._package.setLevel(self._level)


class _LogFile(logging.FileHandler):
    """Keeps its last lines in memory; says once, in one line, that the file cannot be written, not for each record."""

    _has_complained = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        self.tail.append(text[:_LINE_LIMIT])
        return text

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_complained:
            self._has_complained = True
            print(f"runmgr: the log {self.baseFilename} cannot be written: {error.strerror}", file=sys.stderr)  # noqa: T201


class TensorBoard:
    """A `SummaryWriter` that is made at its first use; after a restore it first purges the steps to be done again.

    A disk that refuses what is written costs scalars, with a warning, never the training: the next `flush` makes a new
    writer, since tensorboard's own does nothing any more.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._is_refused = False
        self._making = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = NoTensorBoard().nothing
        with self._tolerated():
            found = getattr(NoTensorBoard() if self._is_refused else self.writer, name)
        return self._tolerating(found) if callable(found) else found

    @property
    def writer(self) -> SummaryWriter:
        """The writer itself; this makes the events file."""
        with self._making:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._log_dir), purge_step=self._purge_step)
            return self._writer

    def add_now(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars and hand them to the operating system, unless the disk refuses. Any thread."""
        for name, value in scalars.items():
            self.add_scalar(name, value, step)
        if (writer := self._writer) is not None:
            with self._tolerated():
                writer.flush()

    def resume_after(self, step: int) -> None:
        """Hide what earlier attempts wrote after `step`, which this attempt does again."""
        self._purge_step = step + 1
        if self._writer is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            event = Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START))
            with self._tolerated():
                self._writer._get_file_writer().add_event(event, self._purge_step)  # type: ignore[no-untyped-call]  # noqa: SLF001

    def flush(self) -> None:
        """Hand what was added to the operating system, so that a killed process loses none of it."""
        self._is_refused = False
        if self._writer is not None:
            with self._tolerated():
                self._writer.flush()

    def close(self) -> None:
        """Close the events file, if there is one."""
        if self._writer is not None:
            with self._tolerated():
                self._writer.close()
            self._writer = None

    def _tolerating(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            with self._tolerated():
                return method(*args, **options)

        return call

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer, self._is_refused = None, True
            logging.getLogger(f"{LOGGER_NAME}.tensorboard").warning(
                "TensorBoard's file in %s cannot be written: %s; scalars are lost until the next save",
                self._log_dir,
                error,
            )


class NoTensorBoard:
    """What ranks other than 0 get: every method is there and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nothing

    def nothing(self, *_args: Any, **_options: Any) -> None:
        """Do nothing."""
