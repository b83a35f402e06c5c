"""Faults at the system call: in a forked child, which keeps its imports, so that a point costs milliseconds.

`deny` installs a seccomp filter in the calling process: from then on a call fails, or pretends to have succeeded. It
cannot be taken back, so it belongs in a child. `with_fault` attaches strace and hits only the nth call.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import platform
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NUMBERS = {
    "x86_64": {
        "flock": 73, "fsync": 74, "rename": 82, "mkdir": 83, "link": 86, "unlink": 87, "mkdirat": 258, "unlinkat": 263,
        "renameat": 264, "linkat": 265, "utimensat": 280, "renameat2": 316, "copy_file_range": 326,
    },
    "aarch64": {
        "flock": 32, "fsync": 82, "rename": None, "mkdir": None, "link": None, "unlink": None, "mkdirat": 34,
        "unlinkat": 35, "renameat": 38, "linkat": 37, "utimensat": 88, "renameat2": 276, "copy_file_range": 285,
    },
}  # fmt: skip
_LIMIT_S = 60.0


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def deny(*names: str, error: int) -> None:
    """Let each of these calls return `error` without being executed; error 0 makes it a success that does nothing."""
    numbers = [number for name in names if (number := _NUMBERS[platform.machine()][name]) is not None]
    load_number, jump_if_equal, answer = 0x20, 0x15, 0x06
    allow, return_errno = 0x7FFF0000, 0x00050000
    steps = [_Instruction(load_number, 0, 0, 0)]
    steps += [_Instruction(jump_if_equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    steps += [_Instruction(answer, 0, 0, allow), _Instruction(answer, 0, 0, return_errno | error)]
    program = _Program(len(steps), (_Instruction * len(steps))(*steps))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, filter_mode, ctypes.byref(program), 0, 0) == 0, os.strerror(ctypes.get_errno())


@dataclass
class Ended:
    """How a child ended: what its function returned or raised, whether it was killed, whether the fault was met."""

    value: Any = None
    error: BaseException | None = None
    was_killed: bool = False
    was_hit: bool = False


def in_child(function: Callable[[], Any]) -> Any:
    """Return what `function` returns in a forked child, or raise what it raises."""
    pid, answers = _fork(function, stopped=False)
    ended = _end(pid, answers)
    assert not ended.was_killed
    if ended.error is not None:
        raise ended.error
    return ended.value


def with_fault(
    function: Callable[..., Any], log: Path, *, call: str, nth: int, fault: str, setup: Callable[[], Any] | None = None
) -> Ended:
    """Run `function` in a child whose nth system call named `call` meets `fault` (strace's words, as "error=EIO").

    With `setup`, the child first calls it without any fault, and `function` gets what it returned. Threads count their
    calls each for itself.
    """
    pid, answers = _fork(function, stopped=True, setup=setup)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", "-q", "-o", str(log), "-p", str(pid), "-e", f"trace={call}"]
    with subprocess.Popen([*command, "-e", f"inject={call}:{fault}:when={nth}"], stderr=subprocess.DEVNULL) as tracer:
        deadline = time.monotonic() + _LIMIT_S
        while _tracer_of(pid) == 0:
            assert tracer.poll() is None, "strace could not attach"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        ended = _end(pid, answers)
    ended.was_hit = ended.was_killed or "INJECTED" in log.read_text()
    return ended


def every_point(function: Callable[[], Any], log: Path, *, calls: tuple[str, ...], fault: str, before, after) -> int:
    """Hit `function` at each of its `calls`, one run a point, with `before()` and `after(call, nth, ended)` around it.

    Returns the number of points that were hit.
    """
    points = 0
    for call in calls:
        for nth in range(1, 100):
            before()
            ended = with_fault(function, log, call=call, nth=nth, fault=fault)
            if not ended.was_hit:
                assert ended.error is None, f"{call} #{nth} was not hit: {ended.error!r}"
                break
            after(call, nth, ended)
            points += 1
    return points


def _fork(
    function: Callable[..., Any], *, stopped: bool, setup: Callable[[], Any] | None = None
) -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()  # answers travel by sendto, which no test breaks
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        given = () if setup is None else (setup(),)
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            answer = Ended(value=function(*given))
        except BaseException as error:  # noqa: BLE001  # the parent judges
            answer = Ended(error=error)
        theirs.sendall(pickle.dumps(answer))
    finally:
        os._exit(0)


def _end(pid: int, answers: socket.socket) -> Ended:
    content = b""
    with answers:
        answers.settimeout(_LIMIT_S)
        try:
            while part := answers.recv(1 << 16):
                content += part
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return Ended(was_killed=True)
    return pickle.loads(content)


def _tracer_of(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("TracerPid"))
