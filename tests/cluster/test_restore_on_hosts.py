"""Several hosts restore from a file system that they share: the file crosses the network once for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import SHARED, hosts

JOB = Path(__file__).with_name("restore_job.py")
_FILE_BYTES = 8 * (8 << 20)


@pytest.mark.long
@pytest.mark.needs("root")
@pytest.mark.needs("nsenter")
@pytest.mark.needs("ip")
@pytest.mark.needs("glusterd")
def test_a_checkpoint_crosses_the_network_once_for_each_host(tmp_path):
    with hosts(3, tmp_path) as cluster:
        cluster.share_by_gluster([1, 2], 3)
        cluster.torchrun([1], 1, JOB, SHARED, "save")
        for client in (1, 2):
            cluster.shell(client, f"umount {SHARED}; mount -t glusterfs 10.77.0.3:/gv {SHARED}")  # empty caches
        before = [cluster.traffic_bytes(host) for host in (1, 2, 3)]
        printed = "".join(cluster.torchrun([1, 2], 4, JOB, SHARED))
        for rank in range(8):
            assert f"rank {rank} epoch 1 sum {3.0 * (_FILE_BYTES // 4)}" in printed
        after = [cluster.traffic_bytes(host) for host in (1, 2, 3)]
        received = [after[host][0] - before[host][0] for host in (0, 1)]
        sent = after[2][1] - before[2][1]
        assert all(_FILE_BYTES < count < 1.2 * _FILE_BYTES for count in received), (received, sent)
        assert 2 * _FILE_BYTES < sent < 2.4 * _FILE_BYTES
