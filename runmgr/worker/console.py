"""Standard output and error, captured at their descriptors: C++, NCCL and child processes included.

Descriptors 1 and 2 lead into a pipe (a terminal of our own where they were one), which a small process of its own
copies into the file and on to where they led before, see `tee.py`. `docs/design.md` says why it is built so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import io
import os
import subprocess
import sys
import threading
import traceback
import tty
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from runmgr.worker import tee

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable
    from pathlib import Path

_STANDARD = (1, 2)
_PATIENCE_S = 10.0
_LINE_BUFFERED = 1  # <stdio.h>'s _IOLBF


def capture(path: Path | None, logger: logging.Logger) -> Console | NoConsole:
    """Write what this process and its children print into `path` as well, until `close`. A failure costs a warning."""
    try:
        return NoConsole() if path is None else Console(path, logger)
    except (OSError, RuntimeError) as error:  # a closed descriptor, no process or no thread to be had
        logger.warning("standard output and error are not captured: %s", error)
        return NoConsole()


class Console:
    """An open capture of descriptors 1 and 2. Main thread only."""

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        self._path = path
        self._logger = logger
        self._channels = ExitStack()  # what must be closed at the end
        self._places: dict[int, tuple[int, int]] = {}  # descriptor → what it leads to while it is captured
        self._saved: dict[int, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._silent: int | None = None  # where what a notebook shows by itself goes into the file alone
        with ExitStack() as failing:
            failing.callback(self._channels.close)
            self._start()
            failing.pop_all()

    def close(self) -> None:
        """Show what is left and put the descriptors back, unless somebody else has redirected them since."""
        self._flush()
        for descriptor, saved in self._saved.items():
            with suppress(OSError):  # somebody has closed it
                if _place(descriptor) == self._places[descriptor]:
                    os.dup2(saved, descriptor)
        os.write(self._tell, b".")  # closing would not do: forked children hold this end too
        self._thread.join(_PATIENCE_S)
        for undo in self._undo:
            undo()
        if self._thread.is_alive():  # a stopped terminal, or a file server that is away
            self._logger.warning("the console log %s is not complete after %g s", self._path, _PATIENCE_S)
        else:
            self._channels.close()

    def add_traceback(self, error: BaseException | None) -> None:
        """Write down what the interpreter is about to print of the error that has ended the run, after `close`."""
        if error is None or isinstance(error, SystemExit):
            return
        text = "".join(traceback.format_exception(error))
        with suppress(OSError), self._path.open("ab", buffering=0) as file:  # a full disk has been told
            file.write(text.encode(errors="backslashreplace"))

    def _start(self) -> None:
        places: dict[tuple[int, int], list[int]] = {}
        if sys.__stdout__ is None or sys.__stderr__ is None:  # the number may belong to some other file by now
            raise OSError(errno.EBADF, "one of them was closed when Python started")
        for descriptor in _STANDARD:
            places.setdefault(_place(descriptor), []).append(descriptor)
            self._saved[descriptor] = self._closing(os.dup(descriptor))
        self._flush()
        self._streams: list[tuple[int, int]] = []
        with ExitStack() as only_now:
            entrances: list[tuple[list[int], int]] = []
            for descriptors in places.values():  # one pipe where both lead to the same place, so that their order stays
                reading, writing = _channel(descriptors[0])
                self._streams.append((self._closing(reading), descriptors[0]))
                entrances.append((descriptors, _closing_in(only_now, writing)))
            if _is_notebooks(sys.stdout) or _is_notebooks(sys.stderr):
                reading, self._silent = map(self._closing, _pipe())
                self._streams.insert(0, (reading, tee.NOWHERE))
            self._listen, self._tell = map(self._closing, os.pipe())
            answer, answering = os.pipe()
            self._answer = self._closing(answer)
            self._helper = self._start_tee(_closing_in(only_now, answering))
            self._thread = threading.Thread(target=self._watch, name="runmgr-console", daemon=True)
            self._thread.start()
            for descriptors, writing in entrances:
                for descriptor in descriptors:
                    self._places[descriptor] = _place(writing)
                    os.dup2(writing, descriptor)
        self._buffer_lines()

    def _start_tee(self, answering: int) -> subprocess.Popen[bytes]:
        """Start the process; descriptors 1 and 2, not yet captured, are where it shows things."""
        pairs = [f"{reading}:{target}" for reading, target in self._streams]
        return subprocess.Popen(  # noqa: S603  # this interpreter and our own file
            [
                *(sys.executable or "python3", "-I", "-S", tee.__file__, str(self._path)),
                *(str(self._listen), str(answering), *pairs),
            ],
            stdin=subprocess.DEVNULL,
            cwd="/",
            pass_fds=(self._listen, answering, *(reading for reading, _ in self._streams)),
            start_new_session=True,  # Ctrl-C, a closed terminal and torchrun's killpg are for the training
        )

    def _watch(self) -> None:
        """Take over from a process that was killed: without a reader the training would hang in its next line."""
        self._helper.wait()  # it goes on in a process that is nobody's child
        if os.read(self._answer, 1):
            return
        self._logger.warning("the process that copies the console was killed; a thread does it from now on")
        shown = [(reading, self._saved.get(target, tee.NOWHERE)) for reading, target in self._streams]
        tee_here = tee.Tee(str(self._path), shown, self._listen)
        tee_here.until_told()
        tee_here.close()

    def _buffer_lines(self) -> None:
        """Let Python and C hand over each line at once, as on a terminal: what lies in a buffer dies with the process."""
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name)
            if self._silent is not None and _is_notebooks(stream):
                copied = _Copied(stream, self._silent)
                setattr(sys, name, copied)
                self._undo.append(functools.partial(copied.end, name))
            elif _number_of(stream) != descriptor:
                self._logger.warning(
                    "sys.%s (%s) does not lead to the descriptors that are captured, so what Python prints there is not in %s",
                    name,
                    type(stream).__name__,
                    self._path.name,
                )
            elif isinstance(stream, io.TextIOWrapper) and not stream.line_buffering:
                stream.reconfigure(line_buffering=True)
                self._undo.append(functools.partial(_buffer_blocks, stream))
        with suppress(OSError, ValueError):  # no such name in this C library
            library, c_stdout = _c_stdout()
            library.setvbuf(c_stdout, None, _LINE_BUFFERED, 0)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        with suppress(OSError, ValueError):  # as above
            library, c_stdout = _c_stdout()
            library.fflush(c_stdout)

    def _closing(self, descriptor: int) -> int:
        return _closing_in(self._channels, descriptor)


class _Copied:
    """A notebook's `sys.stdout` or `sys.stderr`, which print over the network: what they are given goes into the file too."""

    def __init__(self, stream: Any, descriptor: int) -> None:
        self._stream = stream
        self._descriptor: int | None = descriptor

    def write(self, text: str) -> Any:
        """Print, and copy."""
        written = self._stream.write(text)
        if self._descriptor is not None:
            left = memoryview(text.encode(errors="backslashreplace"))
            while left:
                left = left[os.write(self._descriptor, left) :]
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        """Print and copy each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def end(self, name: str) -> None:
        """Copy no more, and be `sys.<name>` no more."""
        self._descriptor = None
        if getattr(sys, name) is self:
            setattr(sys, name, self._stream)


class NoConsole:
    """Where nothing is captured: every method is there and does nothing."""

    def close(self) -> None:
        """Do nothing."""

    def add_traceback(self, error: BaseException | None) -> None:
        """Do nothing."""


def _closing_in(stack: ExitStack, descriptor: int) -> int:
    if descriptor <= max(_STANDARD):  # standard input was closed, and the kernel gives out the lowest free number
        low, descriptor = descriptor, fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(_STANDARD) + 1)
        os.close(low)
    stack.callback(os.close, descriptor)
    return descriptor


def _place(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _channel(original: int) -> tuple[int, int]:
    """Return where to read and where to write: a terminal in the place of one, so that colours and progress bars stay."""
    if os.isatty(original):
        with suppress(OSError):  # no terminal is left: a pipe will do
            reading, writing = os.openpty()
            tty.setraw(writing)
            tee.copy_window_size(original, reading)
            return reading, writing
    return _pipe()


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    with suppress(OSError):  # this user has too many pipes: it stays at 64 KiB
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, tee.CAPACITY_BYTES)
    return reading, writing


def _is_notebooks(stream: Any) -> bool:
    ipykernel = sys.modules.get("ipykernel.iostream")
    return ipykernel is not None and isinstance(stream, ipykernel.OutStream)


def _number_of(stream: Any) -> int | None:
    """Return the descriptor that a stream writes to; None where it has none, or where there is no stream."""
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def _buffer_blocks(stream: io.TextIOWrapper) -> None:
    with suppress(OSError, ValueError):  # closed
        stream.reconfigure(line_buffering=False)


def _c_stdout() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """Return the C library and its own buffer for standard output, through which C and C++ print."""
    library = ctypes.CDLL(None)
    return library, ctypes.c_void_p.in_dll(library, "stdout")
