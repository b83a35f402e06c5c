"""elastic_job.py ROOT EPOCHS [RESUME]: save every epoch. The ranks meet in torchrun's store alone, so an orphan lives on."""

import os
import sys
import time

import torch

import runmgr

root, epochs, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with runmgr.start_run("elastic", ckpt_root_dir=root, resume=resume) as run:
    epoch = run.restore({}).epoch
    place = f"rank {run.rank} of {run.world_size} in attempt {run.attempt}"
    print(f"pid {os.getpid()} is {place} after epoch {epoch}", flush=True)
    while epoch < epochs:
        time.sleep(0.2)
        epoch += 1
        run.save({"weights": torch.full((1000,), float(epoch))}, epoch=epoch)
