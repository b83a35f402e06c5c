"""not_shared_job.py ROOT...: start a run in each root and print, as JSON lines, how that failed on this rank."""

import json
import os
import sys
import time

import torch

import runmgr

assert torch.__version__  # loaded before the clock starts

for root in sys.argv[1:]:
    start = time.monotonic()
    try:
        runmgr.start_run("exp", ckpt_root_dir=root, timeout_s=5).finish()
        found = {"error": None}
    except runmgr.NotShared as error:
        found = {"error": str(error), **error.fields}
    found |= {"rank": int(os.environ["RANK"]), "root": root, "seconds": time.monotonic() - start}
    sys.stdout.write(json.dumps(found) + "\n")  # one write: the ranks share a pipe
    sys.stdout.flush()
