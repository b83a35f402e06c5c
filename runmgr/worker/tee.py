"""Copies what arrives on pipes into a file, and on to where it would have gone: a process of its own, started by console.py.

It outlives a training that dies, by whatever signal, and reads its pipes to their end. It is run by its path without
site-packages, so it imports nothing but the standard library; it starts in 20 ms and holds 10 MB.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

CAPACITY_BYTES = 1 << 20  # of a pipe: the most that Linux gives to everybody
NOWHERE = -1  # the target of a stream that somebody else shows
_CHUNK_BYTES = 1 << 16
_PAUSE_MS = 1  # a reader that always waits would be woken for each line, which the writer pays for
_RESIZE_S = 1.0
_DEAF_TO = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT")  # Slurm signals every process of a step


class Tee:
    """Reads each of `streams`, a pipe or the master of a terminal, and writes it to the descriptor given with it.

    A file that cannot be written costs what it lacks, which is told once, and is tried again with each piece. A terminal
    that is gone costs the copy there.
    """

    def __init__(self, path: str, streams: Iterable[tuple[int, int]], told: int) -> None:
        self._path = path
        self._streams = dict(streams)
        self._gone = {NOWHERE}
        self._told = told
        self._file: int | None = None
        self._missing_bytes = 0
        self._why = ""
        self._resized = 0.0
        self._poll, self._pause = select.poll(), select.poll()
        for reading in self._streams:
            os.set_blocking(reading, False)
            self._poll.register(reading, select.POLLIN)
            self._pause.register(reading, 0)  # only the last writer's end cuts it short
        self._poll.register(told, select.POLLIN)

    def until_told(self) -> None:
        """Copy until something arrives on `told`, or its writer is dead, and all that was written before that is copied."""
        while self._streams and not self._copy():
            self._pause.poll(_PAUSE_MS)
        self._poll.unregister(self._told)

    def until_closed(self) -> None:
        """Copy until nobody is left who could write: children may live on."""
        while self._streams:
            self._copy()
            self._pause.poll(_PAUSE_MS)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _copy(self) -> bool:
        """Wait for something and copy what has arrived until now; whether `told` was among it."""
        ready = {descriptor for descriptor, _ in self._poll.poll()}
        for reading in list(self._streams):
            self._drain(reading)
        if time.monotonic() - self._resized > _RESIZE_S:
            self._resized = time.monotonic()
            for reading, target in self._streams.items():
                if target not in self._gone:
                    copy_window_size(target, reading)
        return self._told in ready

    def _drain(self, reading: int) -> None:
        """Copy at least what a full pipe holds, or all that is there; not for ever, since somebody may always write."""
        for _ in range(2 * CAPACITY_BYTES // _CHUNK_BYTES):
            try:
                content = os.read(reading, _CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError:  # a terminal's way to say that nobody has it open any more
                content = b""
            if not content:
                self._poll.unregister(reading)
                self._pause.unregister(reading)
                del self._streams[reading]
                return
            self._record(content)
            self._show(self._streams[reading], content)

    def _record(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if self._missing_bytes:
                os.write(self._file, f"[runmgr: {self._missing_bytes} bytes are missing here: {self._why}]\n".encode())
                self._missing_bytes = 0
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self._missing_bytes += len(left)
            if not self._why:
                said = f"runmgr: the console log {self._path} cannot be written: {error.strerror}\n"
                self._show(next(reversed(self._streams.values())), said.encode())
            self._why = str(error.strerror)

    def _show(self, target: int, content: bytes) -> None:
        left = memoryview(content)
        while left and target not in self._gone:
            try:
                left = left[os.write(target, left) :]
            except BlockingIOError:
                select.select([], [target], [])
            except OSError:
                self._gone.add(target)


def copy_window_size(source: int, target: int) -> None:
    """Give one terminal the size of another; nothing happens where either is none."""
    import fcntl
    import termios

    with suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, bytes(8)))


def main() -> None:
    """`tee.py PATH TOLD ANSWER READING:TARGET…`; says one byte on ANSWER when it was told to and everything is copied."""
    for name in _DEAF_TO:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    if os.fork():  # nobody's child: no surprise for a training that waits for all of its own
        os._exit(0)
    path, told, answer, *pairs = sys.argv[1:]
    streams = [(int(reading), int(target)) for reading, target in (pair.split(":") for pair in pairs)]
    tee = Tee(path, streams, int(told))
    tee.until_told()
    with suppress(OSError):  # it died
        os.write(int(answer), b".")
    os.close(int(answer))
    tee.until_closed()
    tee.close()


if __name__ == "__main__":
    main()
