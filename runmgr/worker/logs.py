"""One log file a rank and attempt, and TensorBoard on rank 0."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from runmgr.disk import directory
from runmgr.worker import introduction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

LOGGER_NAME = "runmgr"
_TAIL_LINES, _LINE_LIMIT = 50, 2000
_CLOCK_LIMIT_S = 5.0
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
        self._written: WeakSet[logging.LogRecord] = WeakSet()

    def emit(self, record: logging.LogRecord) -> None:
        if record not in self._written:  # runmgr's own come twice where the root logger has this handler as well
            self._written.add(record)
            super().emit(record)

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

    What it writes first are the summaries that `introduce` returns. A disk that refuses what is written costs scalars,
    with a warning, never the training: the next `flush` makes a new writer, since tensorboard's own does nothing any more.
    """

    def __init__(self, log_dir: Path, introduce: Callable[[], Iterable[Summary]], *, is_new: bool) -> None:
        self._log_dir = log_dir
        self._introduce = introduce
        self._writer: SummaryWriter | None = None
        self._purge_step = 0 if is_new else None  # TensorBoard takes the first start in a run for no restart
        self._is_opened = False  # what opens this attempt's events is on disk
        self._is_refused = False
        self.last_step = -1
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

                self._wait_for_a_later_name()
                self._writer = SummaryWriter(
                    str(self._log_dir), purge_step=None if self._is_opened else self._purge_step
                )
                if not self._is_opened:
                    self._add_introduction()
                self._note_steps()
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
        self._purge_step, self._is_opened = step + 1, False
        self.last_step = step
        if self._writer is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START))
            with self._tolerated():
                self._writer._get_file_writer().add_event(start)  # type: ignore[no-untyped-call]  # noqa: SLF001
                self._add_introduction()
            self.last_step = step

    def flush(self) -> None:
        """Hand what was added to the operating system, so that a killed process loses none of it."""
        self._is_refused = False
        if self._writer is not None:
            with self._tolerated():
                self._writer.flush()
                self._is_opened = True

    def close(self) -> None:
        """Close the events file, if there is one; what is added afterwards goes to another one."""
        if self._writer is not None:
            with self._tolerated():
                self._writer.close()
                self._is_opened = True
            self._writer = None

    def end(self, status: str) -> None:
        """Close the events file, with a word of the run's end if that is its last."""
        if self._writer is not None and status == "completed":
            with self._tolerated():
                self._add_summaries([introduction.completed()])
        self.close()

    def _wait_for_a_later_name(self) -> None:
        """TensorBoard reads a run's files in the order of the seconds in their names, and so must attempts lie."""
        seconds = (name.split(".")[3] for name in os.listdir(self._log_dir) if name.startswith(directory.EVENTS_PREFIX))
        newest = max((int(word) for word in seconds if word.isdecimal()), default=0)
        behind_s = newest + 1 - time.time()
        if 0 < behind_s < _CLOCK_LIMIT_S:
            time.sleep(behind_s)
        elif behind_s > 0:
            logging.getLogger(f"{LOGGER_NAME}.tensorboard").warning(
                "this host's clock is %.0f s behind that of an earlier attempt; TensorBoard shows its curves before",
                behind_s,
            )

    def _add_introduction(self) -> None:
        self._add_summaries(self._introduce())

    def _add_summaries(self, summaries: Iterable[Summary]) -> None:
        assert self._writer is not None
        for summary in summaries:
            self._writer._get_file_writer().add_summary(summary, max(self.last_step, 0))  # type: ignore[no-untyped-call]  # noqa: SLF001

    def _note_steps(self) -> None:
        """Follow the greatest step of what is added, whichever of the writer's methods adds it."""
        assert self._writer is not None
        file_writer = self._writer._get_file_writer()  # type: ignore[no-untyped-call]  # noqa: SLF001
        add_event = file_writer.add_event

        def note(event: Any, step: Any = None, walltime: float | None = None) -> None:
            add_event(event, step, walltime)
            self.last_step = max(self.last_step, event.step)

        file_writer.add_event = note

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
        except Exception as error:
            if not _is_the_disks(error):
                raise
            self._writer, self._is_refused = None, True
            logging.getLogger(f"{LOGGER_NAME}.tensorboard").warning(
                "TensorBoard's file in %s cannot be written: %s; scalars are lost until the next save",
                self._log_dir,
                error,
            )


def _is_the_disks(error: Exception) -> bool:
    """Where TensorFlow is installed tensorboard writes through it, and errors such as a full disk's are TensorFlow's own."""
    return isinstance(error, OSError) or type(error).__module__.startswith("tensorflow.")


class NoTensorBoard:
    """What ranks other than 0 get: every method is there and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.nothing

    def nothing(self, *_args: Any, **_options: Any) -> None:
        """Do nothing."""
