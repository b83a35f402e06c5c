"""One launch, one run, on several hosts with a network and mounts of their own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from filesystems import CACHING, give_own_disks, share_by_sshfs, slow_cable
from hosts import SHARED, hosts

HERE = Path(__file__).parent
pytestmark = [pytest.mark.long, pytest.mark.needs("root"), pytest.mark.needs("nsenter"), pytest.mark.needs("ip")]
LAUNCHES = 10
REMEMBERING = Path("/mnt/remembering")  # for 10 s, also what was missing


def _one_run(cluster, root, *, ranks):
    """Assert that there is one run, as seen from host 1, with a log of each rank and a checkpoint."""
    (run,) = cluster.shell(1, f"ls -d {root}/exp/RUN_*").split()
    names = cluster.shell(1, f"ls {run}").split()
    logs = [name for name in names if name.startswith("log_")]
    assert len(logs) == ranks
    assert "ckpt_latest.pth" in names
    for rank in range(ranks):
        (log,) = (name for name in logs if name.endswith(f"_rank{rank}.txt") or (rank == 0 and "_rank" not in name))
        assert f"rank {rank} was here" in cluster.shell(1, f"cat {run}/{log}")


def _crowd(cluster, clients, root, starts=3):
    """Let 10 launches on several hosts claim runs from one moment on; asserts that no two got the same."""
    moment = time.time() + 1.5
    launches = [
        cluster.start(clients[n % len(clients)], sys.executable, HERE / "claim_job.py", root, str(moment), str(starts))
        for n in range(LAUNCHES)
    ]
    printed = [launch.communicate(timeout=240)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0] * LAUNCHES, printed
    ids = [run_id for text in printed for run_id in text.split()]
    assert len(ids) == len(set(ids)) == LAUNCHES * starts
    found = cluster.shell(clients[0], f"ls {root}/crowd").split()
    assert sorted(found) == sorted(ids)


@pytest.mark.needs("glusterd")
def test_four_hosts_share_one_run_on_glusterfs_also_when_they_remember_that_it_was_missing(tmp_path):
    with hosts(5, tmp_path) as cluster:
        cluster.share_by_gluster([1, 2, 3, 4], 5)
        for number in (1, 2, 3, 4):
            cluster.mount_gluster(number, 5, REMEMBERING, CACHING)
        roots = [SHARED / "default", REMEMBERING / "remembering"]
        printed = "".join(cluster.torchrun([1, 2, 3, 4], 2, HERE / "start_job.py", *roots))
        assert printed.count(": False") == 2 * 8 * 3  # nobody looked too late
        for root in roots:
            _one_run(cluster, root, ranks=8)
        _crowd(cluster, [1, 2, 3, 4], SHARED)
        _crowd(cluster, [1, 2, 3, 4], REMEMBERING / "crowds")


@pytest.mark.needs("glusterd")
def test_a_host_behind_a_cable_of_200_ms_joins_the_same_run(tmp_path):
    with hosts(5, tmp_path) as cluster:
        cluster.share_by_gluster([1, 2, 3, 4], 5)
        with slow_cable(cluster, 2, 200):
            cluster.torchrun([1, 2, 3, 4], 2, HERE / "start_job.py", SHARED / "new")
            _one_run(cluster, SHARED / "new", ranks=8)


@pytest.mark.needs("sshfs")
@pytest.mark.needs("socat")
def test_ten_launches_never_collide_on_sshfs_whose_locks_do_not_exclude(tmp_path):
    with hosts(4, tmp_path) as cluster:
        share_by_sshfs(cluster, [1, 2, 3], 4)
        _crowd(cluster, [1, 2, 3], SHARED)


def test_hosts_with_disks_of_their_own_are_told_so_on_every_rank_and_nothing_stays(tmp_path):
    roots = [SHARED / "empty", SHARED / "missing", SHARED / "used"]
    with hosts(2, tmp_path) as cluster:
        give_own_disks(cluster, [1, 2])
        for number in (1, 2):
            own = f"{roots[2]}/exp/.runmgr"
            cluster.shell(number, f"mkdir -p {roots[0]} {own}/last_run_id {own}/launches; touch {own}/create.lock")
        before = [_names(cluster, number) for number in (1, 2)]
        printed = cluster.torchrun([1, 2], 2, HERE / "not_shared_job.py", *roots)
        found = [json.loads(line) for text in printed for line in text.splitlines() if line.startswith("{")]
        assert sorted((item["rank"], item["root"]) for item in found) == [
            (r, str(root)) for r in range(4) for root in sorted(roots)
        ]
        for item in found:
            assert item["host"] in {"host1", "host2"}
            assert item["path"].startswith(f"{item['root']}/exp/RUN_")
            assert f"host {item['host']} does not see the run directory {item['path']}" in item["error"]
            assert item["seconds"] < 60, "it has 5 s for each exchange"
        for root in roots:
            assert len({item["error"] for item in found if item["root"] == str(root)}) == 1
        assert [_names(cluster, number) for number in (1, 2)] == before


def _names(cluster, number):
    """What lies on a host's disk, but for the marks of the ids that were given out, of which the greatest always stays."""
    return cluster.shell(number, f"cd {SHARED}; find . -not -path '*/last_run_id/*' | sort")
