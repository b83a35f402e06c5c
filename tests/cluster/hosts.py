"""Several hosts on one machine, with a network, a file system that they share, and mounts of their own. Needs root.

A host is a network, a mount and a UTS namespace: its own address (10.77.0.<number>), name (host<number>), /run and /mnt. The
switch that joins them has a namespace too, so nothing shows up outside, and whatever a test starts in a host dies with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from processes import REPOSITORY, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NETWORK = "10.77.0"
SHARED = Path("/mnt/shared")  # on the clients
_PATIENCE_S = 120.0
_OWN_GLUSTER_FOLDERS = "for d in /var/log/glusterfs /run/gluster; do mkdir -p $d; mount -t tmpfs tmpfs $d; done;"


class Hosts:
    """`count` hosts, numbered from 1."""

    def __init__(self, count: int, state: Path) -> None:
        self.count = count
        self._state = state
        self._prefix = f"rm{os.getpid()}-"
        self._numbers: list[int] = []

    def up(self) -> None:
        """Make the switch and the hosts."""
        switch = self._namespace("sw")
        _run("mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "tmpfs", self._state)
        _run("mount", "--make-private", self._state)
        names = "".join(f"{_NETWORK}.{number} host{number}\n" for number in range(1, self.count + 1))
        (self._state / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (self._state / "resolv.conf").touch()  # no name server: what is not in the hosts file fails at once
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0", "stp_state", "0")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for number in range(1, self.count + 1):
            self._add(number, switch)

    def down(self) -> None:
        """End every process in the hosts; their mounts go with their namespaces."""
        for number in self._numbers:
            for pid in _run("ip", "netns", "pids", self._namespace(number)).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.2)
        for number in self._numbers:
            for kind in ("mnt", "uts"):
                subprocess.run(["umount", self._state / f"{kind}.{number}"], check=False, capture_output=True)
            _run("ip", "netns", "del", self._namespace(number))
        for command in (["ip", "netns", "del", self._namespace("sw")], ["umount", "-l", self._state]):
            subprocess.run(command, check=False, capture_output=True)

    def command(self, number: int, *argv: str | Path) -> list[str]:
        """Return what runs `argv` in a host, in the working directory of the caller."""
        inside = [
            f"--net=/run/netns/{self._namespace(number)}",
            f"--mount={self._state}/mnt.{number}",
            f"--uts={self._state}/uts.{number}",
            f"--wdns={REPOSITORY}",
        ]
        return ["nsenter", *inside, "--", *map(str, argv)]

    def run(self, number: int, *argv: str | Path) -> str:
        """Run a command in a host and return what it prints."""
        return _run(*self.command(number, *argv))

    def shell(self, number: int, script: str) -> str:
        """Run a shell script in a host; the first command that fails ends it."""
        return self.run(number, "sh", "-ec", script)

    def address(self, number: int) -> str:
        """Return a host's address; its name, host<number>, works only inside."""
        return f"{_NETWORK}.{number}"

    def cable(self, number: int) -> tuple[str, str, str, str]:
        """Return the namespaces that a host's cable joins, its port at the switch and its address."""
        return self._namespace(number), self._namespace("sw"), f"p{number}", self.address(number)

    def traffic_bytes(self, number: int) -> tuple[int, int]:
        """Return what the host's network card has received and sent so far."""
        (link,) = json.loads(self.run(number, "ip", "-json", "-statistics", "link", "show", "eth0"))
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    def start(self, number: int, *argv: str | Path, **environ: str) -> subprocess.Popen[str]:
        """Start a command in a host; its output is one text."""
        return subprocess.Popen(
            self.command(number, *argv), env=clean_environment(**environ), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def torchrun(
        self, numbers: list[int], ranks: int, *script: str | Path, port: int = 29400, **environ: str
    ) -> list[str]:
        """Run one `torchrun` on each host, joined by a c10d rendezvous on the first; returns what each printed."""
        options = ("--nnodes", str(len(numbers)), "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d")
        meeting = ("--rdzv-endpoint", f"host{numbers[0]}:{port}", "--rdzv-id", "hosts")
        agents = [
            self.start(
                number, sys.executable, "-m", "torch.distributed.run", *options, *meeting,
                "--local-addr", f"{_NETWORK}.{number}", *script, GLOO_SOCKET_IFNAME="eth0", **environ,
            )
            for number in numbers
        ]  # fmt: skip
        printed = [agent.communicate(timeout=240)[0] for agent in agents]
        for agent, text in zip(agents, printed, strict=True):
            assert agent.returncode == 0, text[-4000:]
        return printed

    def share_by_gluster(self, clients: list[int], server: int) -> None:
        """Let `server` export a GlusterFS volume and every client mount it at `SHARED` by a FUSE client of its own."""
        self.shell(
            server,
            f"{_OWN_GLUSTER_FOLDERS} mkdir -p /var/lib/glusterd /mnt/brick; mount -t tmpfs tmpfs /var/lib/glusterd; "
            "mount -t tmpfs -o size=2g tmpfs /mnt/brick; mkdir /mnt/brick/b; "
            "glusterd --pid-file=/run/gluster/glusterd.pid --log-file=/var/log/glusterfs/glusterd.log",
        )
        until(lambda: self.run(server, "gluster", "--mode=script", "pool", "list"))
        volume = ("gluster", "--mode=script", "volume")
        self.run(server, *volume, "create", "gv", "transport", "tcp", f"{_NETWORK}.{server}:/mnt/brick/b", "force")
        self.run(server, *volume, "start", "gv")
        for client in clients:
            until(lambda host=client: self.mount_gluster(host, server))

    def mount_gluster(self, client: int, server: int, at: Path = SHARED, options: str = "") -> None:
        """Mount the volume once more, by a FUSE client with caches of its own."""
        self.shell(
            client, f"mountpoint -q /run/gluster || {{ {_OWN_GLUSTER_FOLDERS} }}; mkdir -p {at}; "
            f"mount -t glusterfs {f'-o {options}' if options else ''} {self.address(server)}:/gv {at}",
        )  # fmt: skip

    def _namespace(self, name: int | str) -> str:
        return f"{self._prefix}{name}"

    def _add(self, number: int, switch: str) -> None:
        name = self._namespace(number)
        _run("ip", "netns", "add", name)
        self._numbers.append(number)
        _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"p{number}", "netns", switch)
        _run("ip", "-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        _run("ip", "-n", name, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
        for kind in ("mnt", "uts"):
            (self._state / f"{kind}.{number}").touch()
        _run(
            "nsenter", f"--net=/run/netns/{name}", "unshare", f"--mount={self._state}/mnt.{number}",
            f"--uts={self._state}/uts.{number}", "--propagation", "private", "sh", "-ec",
            f"hostname host{number}; mount -t tmpfs tmpfs /mnt; mount --bind {self._state}/hosts /etc/hosts; "
            f"mount --bind {self._state}/resolv.conf /etc/resolv.conf; "
            "mount -t tmpfs -o mode=755 tmpfs /run; mkdir /run/lock",
        )  # fmt: skip


@contextlib.contextmanager
def hosts(count: int, state: Path) -> Iterator[Hosts]:
    """Have `count` hosts while the block runs; `state` is an empty folder for what holds them."""
    made = Hosts(count, state)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a test run that is ended takes its hosts along
    try:
        made.up()
        yield made
    finally:
        made.down()
        signal.signal(signal.SIGTERM, before)


def _run(*argv: str | Path) -> str:
    done = subprocess.run(list(map(str, argv)), text=True, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} failed: {done.stderr or done.stdout}")
    return done.stdout


def until(action: Callable[[], object]) -> None:
    """Repeat until it succeeds: a server takes its time to come up."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            action()
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
