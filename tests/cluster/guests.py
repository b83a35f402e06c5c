"""Guests with a kernel of their own (User-mode Linux) and therefore a real NFS client each. Slow: for few, torch-free jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hosts import until

if TYPE_CHECKING:
    from hosts import Hosts

_FIRST_ADDRESS = 100
_GANESHA = """
NFS_CORE_PARAM { Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = true; }
NFSv4 { Grace_Period = 2; Lease_Lifetime = 10; Graceless = true; Minor_Versions = 1; RecoveryBackend = fs; }
EXPORT { Export_Id = 1; Path = /mnt/export; Pseudo = /export; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
  Protocols = 4; Transports = TCP; FSAL { Name = VFS; } }
"""


def export_by_nfs(cluster: Hosts, server: int) -> str:
    """Let a host serve NFS 4.1; returns what to mount."""
    cluster.shell(
        server,
        "mkdir -p /mnt/export /run/ganesha; truncate -s 300M /mnt/image; mkfs.ext4 -qF /mnt/image; "
        "mount -o loop /mnt/image /mnt/export; mount -t tmpfs tmpfs /var/lib/nfs; mkdir -p /var/lib/nfs/ganesha; "
        f"cat > /run/ganesha.conf <<'END'\n{_GANESHA}\nEND\n"
        "ethtool -K eth0 tso off gso off tx off >/dev/null; "
        "ganesha.nfsd -f /run/ganesha.conf -L /run/ganesha.log -p /run/ganesha.pid",
    )
    until(lambda: cluster.shell(server, "ss -ltn | grep -q :2049"))
    return f"{cluster.address(server)}:/export"


def run_in_guests(cluster: Hosts, nfs: str, jobs: list[str], signals: Path, limit_s: float) -> list[str]:
    """Boot a guest for each job, a shell script, and return what each printed. `signals` is at /mnt/signals in all."""
    switch = ["nsenter", f"--net=/run/netns/{cluster.cable(1)[1]}", "--"]
    started = []
    try:
        for number, job in enumerate(jobs, start=1):
            tap = f"guest{number}"
            for command in (
                f"ip tuntap add dev {tap} mode tap", f"ip link set {tap} master br0 up",
                f"ethtool -K {tap} tso off gso off gro off tx off",
            ):  # fmt: skip
                subprocess.run([*switch, *command.split()], check=True, capture_output=True)
            (signals / f"job{number}").write_text(job)
            said = {
                "mem": "512M", "rootfstype": "hostfs", "rootflags": "/", "init": Path(__file__).with_name("guest_init.sh"),
                "umid": f"{signals.name}-{number}", "vec0:transport": f"tap,ifname={tap},depth=64,gro=0", "con": "null",
                "con0": "null,fd:1", "ssl": "null", "job": f"job{number}", "nfs": nfs, "signals": signals,
                "guest_name": tap, "guest_address": cluster.address(_FIRST_ADDRESS + number),
            }  # fmt: skip
            output = (signals / f"out{number}").open("w")
            with output:
                started.append(
                    subprocess.Popen(
                        [*switch, "linux.uml", "ro", "quiet", *(f"{name}={value}" for name, value in said.items())],
                        env=os.environ | {"HOME": str(signals), "TMPDIR": "/dev/shm"}, stdin=subprocess.DEVNULL,
                        stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
        outputs = [signals / f"out{number}" for number in range(1, len(jobs) + 1)]
        deadline = time.monotonic() + limit_s
        while not all("ended with" in output.read_text(errors="replace") for output in outputs):
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(output.read_text(errors="replace")[-2000:] for output in outputs))
            time.sleep(0.1)
        return [output.read_text(errors="replace") for output in outputs]
    finally:
        for guest in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guest.pid, signal.SIGKILL)
            guest.wait()
