"""More that hosts can have: sshfs, whose locks do not exclude, disks of their own, caches that remember, slow cables."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hosts import SHARED, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hosts import Hosts

CACHING = "entry-timeout=10,attribute-timeout=10,negative-timeout=10"  # of the FUSE client, in seconds
_SFTP = "/usr/lib/openssh/sftp-server"
_PORT = 2222


def share_by_sshfs(cluster: Hosts, clients: list[int], server: int) -> None:
    """Let `server` answer sftp without ssh, and every client mount it at `SHARED`. Each client keeps locks to itself."""
    cluster.shell(
        server,
        f"mkdir /mnt/export; setsid socat TCP-LISTEN:{_PORT},reuseaddr,fork EXEC:{_SFTP} </dev/null >/dev/null 2>&1 &",
    )
    for client in clients:
        cluster.shell(client, f"mkdir -p {SHARED}")
        mount = ("sshfs", "-o", f"directport={_PORT}", f"{cluster.address(server)}:/mnt/export", SHARED)
        until(lambda host=client, argv=mount: cluster.run(host, *argv))


def give_own_disks(cluster: Hosts, numbers: list[int]) -> None:
    """Give each host a `SHARED` that is not shared."""
    for number in numbers:
        cluster.shell(number, f"mkdir -p {SHARED}")


@contextlib.contextmanager
def slow_cable(cluster: Hosts, number: int, delay_ms: int) -> Iterator[None]:
    """Let each packet to and from a host take `delay_ms` longer; afterwards the host has no network."""
    script = Path(__file__).with_name("slow_cable.py")
    with subprocess.Popen(
        [sys.executable, script, *cluster.cable(number), str(delay_ms)], stdout=subprocess.PIPE, text=True
    ) as cable:
        try:
            assert cable.stdout is not None
            assert cable.stdout.readline() == "ready\n"
            start = time.monotonic()
            _knock(cluster, number, 1 if number > 1 else 2)
            assert time.monotonic() - start > 2 * delay_ms / 1000
            yield
        finally:
            cable.kill()


def _knock(cluster: Hosts, number: int, other: int) -> None:
    """Ask for a port that is closed: the refusal has been there and back."""
    code = f"import socket; print(socket.socket().connect_ex(({cluster.address(other)!r}, 9)))"
    assert cluster.run(number, sys.executable, "-c", code) == f"{errno.ECONNREFUSED}\n"
