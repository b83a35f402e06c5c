"""Real torchrun ranks: one directory, a log for each rank that logs, and checkpoints that only rank 0 writes."""

from __future__ import annotations

import json
import re
import sys

import pytest
from processes import TORCHRUN_RANKS as RANKS
from processes import run

import runmgr

LOGGING = {"all": range(RANKS), "few": (0, RANKS - 1)}
SCRIPT = f"""
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import runmgr

dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Linear(2, 2))
for experiment, logging in {LOGGING}.items():
    with runmgr.start_run(experiment, monitor="acc") as run:
        average = runmgr.BestAverage(model, k=2)
        state = {{"net": model, "average": average}}
        run.restore(state)
        if run.rank in logging:
            run.logger.info("rank %d was here", run.rank)
        for epoch in (1, 2):
            average.update(epoch)
            run.log_scalars({{"acc": epoch}}, step=epoch)
            run.save(state, epoch=epoch, metrics={{"acc": epoch}})
        with average.applied():
            pass
        run.save_average(average)
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.needs("strace")
@pytest.mark.timeout(480)
def test_ranks_share_a_directory_and_only_rank_0_opens_checkpoints_for_writing(tmp_path, root):
    script, trace = tmp_path / "train.py", tmp_path / "trace"
    script.write_text(SCRIPT)
    done = run(
        "strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=open,openat,creat", "-o", str(trace),
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", str(script),
        timeout_s=450, RUNMGR_CKPT_ROOT_DIR=str(root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for experiment, logging in LOGGING.items():
        (info,) = runmgr.list_runs(experiment, root)
        assert (info.status, info.world_size) == ("completed", RANKS)
        assert len(list(info.path.glob("events.out.tfevents.*"))) == 1
        logs = {
            int((re.findall(r"_rank(\d+)\.txt", path.name) or [0])[0]): path for path in info.path.glob("log_*.txt")
        }
        assert sorted(logs) == list(logging)
        assert all(f"rank {rank} was here" in path.read_text() for rank, path in logs.items())
        rank_0 = json.loads((info.path / ".runmgr/attempts/0001.json").read_text())["pid"]
        opened = re.findall(
            rf'^(\d+) .*"{re.escape(str(info.path))}[^"]*\.pth[^"]*", (O_\S+)', trace.read_text(), re.MULTILINE
        )
        writers = {int(pid) for pid, flags in opened if re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", flags)}
        assert writers == {rank_0}
        assert len({pid for pid, _ in opened}) >= 1
