"""claim_job.py ROOT MOMENT STARTS: claim run directories, torch-free, from MOMENT on; one clock in whole seconds for all,
so that all rivals want the same ids. Prints each id."""

import sys
import time

from runmgr.disk import claiming, directory

root, moment, starts = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
directory.now_us = lambda: int(moment) * 1_000_000
experiment = directory.Experiment(directory.resolve_root(root), "crowd")
time.sleep(max(0.0, moment - time.time()))
for _ in range(starts):
    run, _ = claiming.create_run(experiment, "token")
    claiming.confirm_shared(run, "token", host="here", timeout_s=5)
    print(run.run_id, flush=True)
