"""A torchrun agent, and with it a host, is lost: training goes on in the same run, whatever the orphaned worker does."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import inside
import pytest
import torch
from hosts import SHARED, hosts
from processes import clean_environment, descendants, kill

import runmgr

pytestmark = [
    pytest.mark.needs("root"), pytest.mark.needs("nsenter"), pytest.mark.needs("ip"), pytest.mark.needs("glusterd"),
    pytest.mark.long, pytest.mark.timeout(900),
]  # fmt: skip
JOB = Path(__file__).with_name("elastic_job.py")
QUICK = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        made.share_by_gluster([1, 2], 3)
        yield made


class Launch:
    """One torchrun agent with one rank on hosts 1 and 2, `--nnodes 1:2`; the rendezvous is at host 1, or a third one."""

    def __init__(self, cluster, folder, root, epochs, resume, rendezvous=1):
        self.printed = {}
        self.agents = {}
        for number in (1, 2):
            self.printed[number] = folder / f"{time.monotonic_ns()}-host{number}"
            command = cluster.command(
                number, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
                "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"host{rendezvous}:29400",
                "--rdzv-id", "elastic", "--rdzv-conf", QUICK, "--local-addr", f"10.77.0.{number}",
                JOB, root, str(epochs), resume,
            )  # fmt: skip
            with self.printed[number].open("w") as output:
                self.agents[number] = subprocess.Popen(
                    command, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )

    def kill_agent(self, number):
        """Kill -9 an agent, not its worker; returns the worker."""
        (orphan,) = descendants(self.agents[number].pid)
        self.agents[number].kill()
        self.agents[number].wait()
        return orphan

    def rank_of(self, pid):
        """What a worker said of itself in its last start: its rank, the world size and the attempt."""
        said = re.findall(rf"pid {pid} is rank (\d+) of (\d+) in attempt (\d+)", self.text())
        return tuple(map(int, said[-1]))

    def text(self):
        return "".join(path.read_text() for path in self.printed.values())

    def end(self):
        for agent in self.agents.values():
            with contextlib.suppress(ProcessLookupError):
                kill([*descendants(agent.pid), agent.pid])
            agent.wait()


@contextlib.contextmanager
def launched(*args, **options):
    made = Launch(*args, **options)
    try:
        yield made
    finally:
        made.end()


def state_of(root):
    """What a look-up in a host says of the only run."""
    (info,) = runmgr.list_runs("elastic", root)
    attempt = json.loads((info.path / f".runmgr/attempts/{info.attempt:04d}.json").read_bytes())
    latest = torch.load(info.path / "ckpt_latest.pth", weights_only=True) if info.latest else {"epoch": 0}
    return json.dumps([info.run_id, info.attempt, info.status, attempt["world_size"], latest["epoch"]])


def look(cluster, root):
    return json.loads(inside.call(cluster, 2, state_of, root))


def wait_for(cluster, root, launch, condition):
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(AssertionError):
            if condition(*look(cluster, root)):
                return
        assert time.monotonic() < deadline, launch.text()[-4000:]
        time.sleep(0.2)


def is_alive(pid):
    return Path(f"/proc/{pid}").exists()


def test_training_goes_on_at_the_other_size_when_an_agent_is_killed(cluster, tmp_path):
    """An agent without the store, that is: the one of rank 0 has it, and its death is the next test's."""
    root = SHARED / "lost"
    with launched(cluster, tmp_path, root, 40, "auto") as launch:
        wait_for(cluster, root, launch, lambda _, attempt, status, size, epoch: size == 2 and epoch > 3)
        orphan = launch.kill_agent(2)
        (left,) = descendants(launch.agents[1].pid)
        _, _, before = launch.rank_of(orphan)
        try:
            time.sleep(3)
            kill([left])  # the ranks go on without the agent until one fails; a collective would, with a real host lost
            wait_for(cluster, root, launch, lambda _, attempt, status, size, epoch: attempt > before and size == 1)
            assert is_alive(orphan)
            assert launch.agents[1].wait(240) == 0, launch.text()[-4000:]
            deadline = time.monotonic() + 240
            while is_alive(orphan) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            kill([orphan])
        _, attempt, status, size, epoch = look(cluster, root)
        assert (attempt, status, size, epoch) == (before + 1, "completed", 1, 40)


def test_where_torchrun_gives_up_the_same_command_again_goes_on_in_the_same_run(cluster, tmp_path):
    root = SHARED / "gave-up"
    with launched(cluster, tmp_path, root, 40, "latest") as launch:
        wait_for(cluster, root, launch, lambda _, attempt, status, size, epoch: size == 2 and epoch > 3)
        orphan = launch.kill_agent(1)
        try:
            assert launch.agents[2].wait(240) != 0, "its store was the first agent's"
            deadline = time.monotonic() + 240
            while is_alive(orphan):
                assert time.monotonic() < deadline, "it lost the store as well"
                time.sleep(0.1)
        finally:
            kill([orphan])
    run_id, attempt, _, _, epoch = look(cluster, root)
    with launched(cluster, tmp_path, root, 40, "latest") as again:
        for agent in again.agents.values():
            assert agent.wait(240) == 0, again.text()[-4000:]
    assert look(cluster, root) == [run_id, attempt + 1, "completed", 2, 40]
    assert 3 < epoch < 40


@contextlib.contextmanager
def rendezvous_at(cluster, number):
    """Host the rendezvous where no agent is, as a login node may."""
    store = "dist.TCPStore('', 29400, is_master=True, wait_for_workers=False)"
    serve = f"import signal, torch.distributed as dist; store = {store}; signal.pause()"
    process = subprocess.Popen(cluster.command(number, sys.executable, "-c", serve), env=clean_environment())
    try:
        yield
    finally:
        kill([*descendants(process.pid), process.pid])
        process.wait()


def test_the_run_is_known_again_by_the_agents_when_rank_0s_agent_is_lost_with_its_store(cluster, tmp_path):
    root = SHARED / "moved"
    with rendezvous_at(cluster, 3), launched(cluster, tmp_path, root, 40, "auto", rendezvous=3) as launch:
        wait_for(cluster, root, launch, lambda _, attempt, status, size, epoch: size == 2 and epoch > 3)
        run_id, before, _, _, epoch = look(cluster, root)
        ranks = {number: launch.rank_of(*descendants(launch.agents[number].pid))[0] for number in (1, 2)}
        lost, left = sorted(ranks, key=ranks.get)
        orphan = launch.kill_agent(lost)
        try:
            assert launch.agents[left].wait(120) == 0, launch.text()[-4000:]
        finally:
            kill([orphan])
        assert look(cluster, root) == [run_id, before + 1, "completed", 1, 40]
        said = re.findall(r"is rank 0 of 1 in attempt \d+ after epoch (\d+)", launch.printed[left].read_text())
        assert 3 < epoch <= int(said[-1]), "it went on where it was"
