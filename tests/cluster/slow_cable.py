"""slow_cable.py HOST_NAMESPACE SWITCH_NAMESPACE PORT ADDRESS DELAY_MS: a host's cable that takes its time.

The kernel need not have netem: both ends are TAP devices, and this process carries each packet across when it is due.
Killing it pulls the cable.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

_NEW_NETWORK, _SET_DEVICE, _TAP_WITHOUT_HEADER = 0x40000000, 0x400454CA, 0x1002
_FRAME_BYTES = 1 << 16


def open_tap(namespace: str, name: str) -> int:
    """Make a TAP device in a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as target:
        if libc.setns(target.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _SET_DEVICE, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return device


def carry(one: int, other: int, delay_s: float) -> None:
    """Take packets from each end and put them out at the other, in order, when they are due."""
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select([one, other], [], [], wait_s)[0]:
            try:
                frame = os.read(device, _FRAME_BYTES)
            except BlockingIOError:
                continue
            under_way.append((time.monotonic() + delay_s, other if device == one else one, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, device, frame = under_way.popleft()
            try:
                os.write(device, frame)
            except OSError:  # a full queue or a card that is going down loses packets, as a real one does
                continue


def main(host: str, switch: str, port: str, address: str, delay_ms: str) -> None:
    """Replace the host's cable and carry until killed."""

    def ip(namespace: str, *words: str) -> None:
        subprocess.run(["ip", "-n", namespace, *words], check=True)

    ip(host, "link", "del", "eth0")
    ends = open_tap(host, "eth0"), open_tap(switch, port)
    ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
    ip(host, "link", "set", "eth0", "up")
    ip(switch, "link", "set", port, "master", "br0", "up")
    print("ready", flush=True)
    carry(*ends, float(delay_ms) / 1000)


main(*sys.argv[1:])
