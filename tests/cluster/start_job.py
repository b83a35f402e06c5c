"""start_job.py ROOT...: start a run in each root on every rank, log, save once.

All ranks but 0 look the experiment up before it is there, so that their host's cache may hold that it is missing.
"""

import os
import sys
import time
from pathlib import Path

import torch

import runmgr

rank = int(os.environ["RANK"])
for root in map(Path, sys.argv[1:]):
    if rank == 0:
        time.sleep(1)
    for path in (root, root / "exp", root / "exp" / ".runmgr"):
        print(f"rank {rank} looked up {path}: {path.exists()}")
    start = time.monotonic()
    with runmgr.start_run("exp", ckpt_root_dir=root) as run:
        took_s = time.monotonic() - start
        run.logger.info("rank %d was here", rank)
        run.save({"net": torch.nn.Linear(2, 2)}, epoch=1)
    print(f"rank {rank} in {run.run_dir} after {took_s:.2f} s")
