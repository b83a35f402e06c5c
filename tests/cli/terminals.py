"""A command on a terminal of a given size, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from processes import clean_environment

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(*arguments, columns=100, code=None, **environ):
    """Run `runmgr …`, or Python code, on a terminal of its own; returns its status and all that it wrote there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environ = {"TERM": "xterm-256color", "LANG": "C.UTF-8"} | environ
    process = subprocess.Popen(
        [sys.executable, *(["-c", code] if code else ["-m", "runmgr.cli", *arguments])],
        stdin=slave, stdout=slave, stderr=slave,
        env=clean_environment(**environ), start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    written = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the last one has closed it
            break
        if not part:
            break
        written += part
    os.close(master)
    return process.wait(timeout=60), written.decode().replace("\r\n", "\n")


def plain(text):
    """What is left without colours and cursor movements."""
    return _ESCAPES.sub("", text)
