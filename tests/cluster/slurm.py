"""A real Slurm on hosts of `hosts.py`: controller on the first, a node on each, no systemd, cgroups or accounting.

Its daemons live in the hosts' namespaces and end with them; nothing is configured outside.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from hosts import until
from processes import REPOSITORY, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hosts import Hosts

_PATIENCE_S = 240.0
_OWN_FOLDERS = ("/etc/munge", "/var/log/munge", "/var/lib/munge", "/etc/slurm")
CREDENTIALS_S = 5  # how long they are valid; Slurm's own choice is two minutes
_CONFIGURATION = f"""
ClusterName=test
SlurmctldHost=host1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire={CREDENTIALS_S}
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=15
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class Slurm:
    """`sbatch`, `scontrol` and their kin on the first host; what jobs print lands in `folder`."""

    def __init__(self, cluster: Hosts, folder: Path) -> None:
        self._cluster = cluster
        self.folder = folder
        self._environ = clean_environment(
            GLOO_SOCKET_IFNAME="eth0", RUNMGR_CKPT_ROOT_DIR=str(folder / "checkpoints"), VIRTUAL_ENV=sys.prefix,
            PYTHONUNBUFFERED="1",
        )  # fmt: skip

    def up(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        numbers = range(1, self._cluster.count + 1)
        nodes = "".join(f"NodeName=host{n} NodeAddr=10.77.0.{n} CPUs=8 RealMemory=2000\n" for n in numbers)
        for name, content in (("slurm.conf", _CONFIGURATION + nodes), ("cgroup.conf", "CgroupPlugin=cgroup/v1\n")):
            (self.folder / name).write_text(content)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        for number in numbers:
            self._cluster.shell(
                number,
                "mkdir -p /run/munge /run/slurm/state /run/slurm/spool; chown munge: /run/munge; chmod 755 /run/munge; "
                f"for d in {' '.join(_OWN_FOLDERS)}; do mkdir -p $d; mount -t tmpfs -o mode=755 tmpfs $d; done; "
                f"cp {self.folder}/munge.key /etc/munge/; cp {self.folder}/*.conf /etc/slurm/; "
                "chown -R munge: /etc/munge /var/log/munge /var/lib/munge; chmod 400 /etc/munge/munge.key; "
                "chmod 700 /etc/munge /var/log/munge; setpriv --reuid=munge --regid=munge --clear-groups munged; "
                + ("slurmctld -c; " if number == 1 else "")
                + f"slurmd -N host{number}",
            )
        until(self._check_idle)

    def call(self, *argv: str | Path, fails: bool = False) -> str:
        """Run a command on the first host, to its end, and return what it printed."""
        done = subprocess.run(
            self._cluster.command(1, *argv), env=self._environ, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=_PATIENCE_S,
        )  # fmt: skip
        assert fails or done.returncode == 0, done.stdout
        return done.stdout

    def submit(self, name: str, *argv: str | Path) -> Job:
        """Give Slurm a batch job."""
        output = self.folder / f"{name}.out"
        shared = ("--parsable", f"--job-name={name}", "--open-mode=append", f"--output={output}")
        return Job(self, int(self.call("sbatch", *shared, *argv)), output)

    def script(self, name: str, lines: str) -> Path:
        """Write a batch script."""
        path = self.folder / f"{name}.sh"
        path.write_text(f"#!/bin/bash\n{lines}\n")
        return path

    def _check_idle(self) -> None:
        states = self._cluster.run(1, "sinfo", "-h", "-N", "-p", "low", "-o", "%t").split()
        if states != ["idle"] * self._cluster.count:
            raise RuntimeError(f"the nodes are {states}")


class Job:
    """A batch job, its requeues included."""

    def __init__(self, slurm: Slurm, number: int | str, output: Path) -> None:
        self.number = number
        self._slurm = slurm
        self._output = output

    def task(self, index: int) -> Job:
        """Return one task of an array; it prints where the others do."""
        return Job(self._slurm, f"{self.number}_{index}", self._output)

    def printed(self) -> str:
        """Return what the job has printed so far."""
        return self._output.read_text() if self._output.exists() else ""

    def lines(self, word: str) -> list[list[str]]:
        """Return the job's lines that begin with `word`, in words."""
        return [line.split() for line in self.printed().splitlines() if line.split()[:1] == [word]]

    def wait_for(self, word: str, count: int = 1) -> list[list[str]]:
        """Wait until the job has printed so many lines that begin with `word`, and return them."""
        self.until(lambda: len(self.lines(word)) >= count)
        return self.lines(word)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; what the job printed says why it did not come."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.printed()[-6000:]}"
            time.sleep(0.05)

    def state(self) -> str:
        """Return Slurm's word for what the job does."""
        shown = self._slurm.call("scontrol", "show", "job", str(self.number))
        return shown.partition("JobState=")[2].split()[0]

    def requeue(self) -> None:
        """Have the job started anew, and at once: Slurm would wait for its credentials to expire."""
        self._slurm.call("scontrol", "requeue", str(self.number))
        self.start_now()

    def start_now(self) -> None:
        """Start a requeued job as soon as Slurm holds it ready."""
        self.until(lambda: self.state() == "PENDING")
        self.until(lambda: self._poked() == "RUNNING")

    def _poked(self) -> str:
        self._slurm.call("scontrol", "update", f"jobid={self.number}", "StartTime=now", fails=True)
        time.sleep(0.3)
        return self.state()

    def cancel(self) -> None:
        """End the job."""
        self._slurm.call("scancel", "--full", str(self.number))
        self._slurm.call("scancel", "--signal=KILL", "--full", str(self.number), fails=True)
        self.until(lambda: self.state() not in {"RUNNING", "PENDING", "COMPLETING"})


LAUNCH = REPOSITORY / "scripts" / "launch.sh"
