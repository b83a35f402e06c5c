"""`runmgr doctor` under a launcher, on several hosts; torch-free, so it starts at once."""

from __future__ import annotations

import json
import sys
import time

import pytest
from filesystems import give_own_disks, share_by_sshfs
from hosts import SHARED, hosts

pytestmark = [pytest.mark.long, pytest.mark.needs("root"), pytest.mark.needs("nsenter"), pytest.mark.needs("ip")]
IMPATIENT = (
    "import sys; from runmgr.disk import probe_hosts as p; p.follow.__kwdefaults__['limit_s'] = 3.0; "
    "p.leading.__wrapped__.__kwdefaults__['limit_s'] = 3.0; from runmgr.cli import main; sys.exit(main())"
)


def _start(cluster, numbers, *arguments, program=("-m", "runmgr.cli")):
    """Start one `runmgr doctor` on each host, as `srun` would."""
    size = {"SLURM_STEP_NUM_TASKS": str(len(numbers)), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}
    return [
        cluster.start(number, sys.executable, *program, "doctor", SHARED, *arguments, SLURM_PROCID=str(rank), **size)
        for rank, number in enumerate(numbers)
    ]


def _doctor(cluster, numbers, **options):
    """Return the statuses, rank 0's findings by name, and what the other ranks printed."""
    started = _start(cluster, numbers, "--json", **options)
    printed = [process.communicate(timeout=240)[0] for process in started]
    told = json.loads(printed[0])
    return [process.returncode for process in started], told, {f["name"]: f for f in told["findings"]}, printed[1:]


def _left(cluster, number):
    return cluster.shell(number, f"ls -A {SHARED}").split()


@pytest.mark.needs("glusterd")
def test_glusterfs_is_found_shared_with_locks_that_exclude(tmp_path):
    with hosts(4, tmp_path) as cluster:
        cluster.share_by_gluster([1, 2, 3], 4)
        statuses, told, findings, others = _doctor(cluster, [1, 2, 3])
        assert told["hosts"] == ["host1", "host2", "host3"]
        for name in ("shared", "new name", "replaced file", "locks between hosts", "mkdir between hosts", "clocks"):
            assert findings[name]["verdict"] == "fine", findings[name]
        assert findings["mkdir between hosts"]["figures"]["names"] == 100
        assert "fuse.glusterfs" in findings["file system"]["measured"]
        worst = int(told["verdict"] != "fine")  # its fsync may be slow on a busy machine
        assert (statuses, others) == ([worst] * 3, ["", ""])
        assert _left(cluster, 2) == []
        started = _start(cluster, [1, 2, 3])
        while "name-0" not in cluster.shell(2, f"ls {SHARED}/.runmgr-doctor-*/ 2>&1 || true"):
            time.sleep(0.01)
        started[0].kill()  # and rank 0 killed in the middle leaves nothing either
        printed = [process.communicate(timeout=240)[0] for process in started]
        assert [process.returncode for process in started] == [-9, 1, 1]
        assert "rank 0 ended early" in printed[1]
        deadline = time.monotonic() + 60
        while _left(cluster, 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _left(cluster, 2) == []


@pytest.mark.needs("sshfs")
@pytest.mark.needs("socat")
def test_sshfs_is_found_to_have_locks_that_do_not_exclude(tmp_path):
    with hosts(3, tmp_path) as cluster:
        share_by_sshfs(cluster, [1, 2], 3)
        statuses, told, findings, _ = _doctor(cluster, [1, 2])
        assert statuses == [1, 1]
        assert findings["locks between hosts"]["verdict"] == "worse"
        assert "host2 got it too" in findings["locks between hosts"]["measured"]
        assert "claimed by mkdir alone" in findings["locks between hosts"]["consequence"]
        for name in ("shared", "mkdir between hosts"):
            assert findings[name]["verdict"] == "fine", findings[name]
        assert told["verdict"] == "worse"
        assert cluster.shell(3, "ls -A /mnt/export") == ""


def test_disks_of_their_own_are_found_not_to_be_shared_and_both_hosts_say_so(tmp_path):
    with hosts(2, tmp_path) as cluster:
        give_own_disks(cluster, [1, 2])
        statuses, told, findings, (other,) = _doctor(cluster, [1, 2], program=("-c", IMPATIENT))
        assert statuses == [1, 1]
        assert findings["shared"]["verdict"] == told["verdict"] == "unsafe"
        assert findings["shared"]["figures"] == {"hosts": ["host1"], "missing_ranks": [1]}
        assert other.count("\n") == 1
        assert f"host host2 (rank 1) does not share {SHARED} with rank 0" in other
        assert _left(cluster, 1) == _left(cluster, 2) == []
