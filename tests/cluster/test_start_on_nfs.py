"""NFS 4.1 with real kernel clients, which remember for 30 s what they looked up."""

from __future__ import annotations

import re
import sys

import pytest
from guests import export_by_nfs, run_in_guests
from hosts import hosts
from processes import REPOSITORY

JOB = """
cd {repository}/tests/cluster; export PYTHONPATH={repository}
{python} nfs_job.py {rank}
while ! [ -s /mnt/signals/moment ]; do sleep 0.1; done
for launch in 1 2 3 4 5; do {python} claim_job.py /mnt/shared $(cat /mnt/signals/moment) 2 & done; wait
"""


@pytest.mark.long
@pytest.mark.needs("root")
@pytest.mark.needs("ip")
@pytest.mark.needs("ethtool")
@pytest.mark.needs("linux.uml")
@pytest.mark.needs("ganesha.nfsd")
@pytest.mark.needs("mount.nfs4")
def test_two_guests_on_nfs_share_a_run_that_one_believes_to_be_missing_and_never_collide(tmp_path):
    state, signals = tmp_path / "state", tmp_path / "signals"
    state.mkdir()
    signals.mkdir()
    jobs = [JOB.format(repository=REPOSITORY, python=sys.executable, rank=rank) for rank in (0, 1)]
    with hosts(1, state) as cluster:
        printed = run_in_guests(cluster, export_by_nfs(cluster, 1), jobs, signals, 240)
        assert "looked up: [False, False]" in printed[1]
        assert "a look says: False" in printed[1]  # else this shows nothing
        assert "confirmed after" in printed[1]  # within 20 s, or it fails; the client remembers for 30
        ids = re.findall(r"RUN_\w+", "".join(printed))
        assert len(ids) == len(set(ids)) == 20
        assert sorted(cluster.shell(1, "ls /mnt/export/crowd").split()) == sorted(ids)
