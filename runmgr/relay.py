"""torchrun that hands SIGUSR1 and SIGUSR2 on to its ranks: `python -m runmgr.relay <what torchrun takes>`.

torchrun dies of both, and its ranks with it, while Slurm's `--signal=USR1@60` means them as a warning. They are handed
on only to processes that catch them: to a rank that does not listen yet the signal would be the end, so it is offered
again until it does. SIGTERM and SIGINT stay torchrun's own: it passes them on and waits 30 seconds.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_PAUSE_S = 0.5


def main() -> None:
    """Be torchrun in this process, with the signals handed on."""
    listen()
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


def listen() -> None:
    """Hand the signals on from now on. Main thread only."""
    received: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put() may interrupt itself

    def handle(number: int, _: FrameType | None) -> None:
        received.put(number)

    for number in SIGNALS:
        signal.signal(number, handle)
    threading.Thread(target=_hand_on, args=(received,), name="runmgr-relay", daemon=True).start()


def _hand_on(received: queue.SimpleQueue[int]) -> None:
    pending: list[tuple[int, set[int]]] = []
    while True:
        with contextlib.suppress(queue.Empty):
            pending.append((received.get(timeout=_PAUSE_S if pending else None), set()))
        pending = [(number, told) for number, told in pending if not offer(number, os.getpid(), told)]


def offer(number: int, pid: int, told: set[int]) -> bool:
    """Send the signal below each child of `pid` that is not in `told`, to the nearest processes that catch it.

    Children where some did are added to `told`; returns whether all children, and at least one, are in it now.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            children.setdefault(_parent(name), []).append(int(name))
    ranks = children.get(pid, [])
    for rank in ranks:
        if rank not in told and _tell(number, rank, children):
            told.add(rank)
    return bool(ranks) and told.issuperset(ranks)


def _tell(number: int, pid: int, children: dict[int, list[int]]) -> bool:
    if not _catches(pid, number):
        heard = [_tell(number, child, children) for child in children.get(pid, ())]
        return any(heard)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
    return True


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError):  # it has ended
        return 0


def _catches(pid: int, number: int) -> bool:
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):  # it has ended
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


if __name__ == "__main__":
    main()
