"""A training for test_slurm.py: `slurm_job.py STEPS [anything]` counts steps, saves, and prints where it is.

With GROUP_PORT set, its ranks open a process group as users of plain srun do.
"""

from __future__ import annotations

import os
import sys
import time

import runmgr

steps = int(sys.argv[1])
if port := os.environ.get("GROUP_PORT"):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://host1:{port}", rank=int(os.environ["SLURM_PROCID"]),
        world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
    )  # fmt: skip


def say(*words):
    if run.is_main:
        os.write(1, (" ".join(map(str, words)) + "\n").encode())


with runmgr.start_run("job", tags=[f"job-{os.environ['SLURM_JOB_ID']}"]) as run:
    progress = run.restore({"steps": 0})
    say("start", run.run_id, run.attempt, progress.step, run.world_size, *sys.argv[2:])
    for step in range(progress.step + 1, steps + 1):
        time.sleep(0.02)
        if run.should_stop():
            run.save({"steps": step}, step=step)
            say("stop", run.run_id, step)
            break
        if step % 50 == 0:
            run.save({"steps": step}, step=step)
            say("saved", run.run_id, step)
    else:
        run.save({"steps": steps}, step=steps)
        say("end", run.run_id, steps)
