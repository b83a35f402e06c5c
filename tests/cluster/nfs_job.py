"""nfs_job.py RANK: two guests, torch-free. Guest 1 remembers that the directory is missing, guest 0 makes it, guest 1 must
see it. They speak through /mnt/signals, which is not NFS."""

import os
import sys
import time
from pathlib import Path

from runmgr.disk import claiming, directory

experiment = directory.Experiment(Path("/mnt/shared/new"), "exp")
signals = Path("/mnt/signals")


def wait_for(name):
    while name not in os.listdir(signals):
        time.sleep(0.02)
    time.sleep(0.2)
    return (signals / name).read_text()


if sys.argv[1] == "1":
    print("looked up:", [path.exists() for path in (experiment.root, experiment.path)])
    (signals / "looked").write_text("x")
    run = experiment.run(wait_for("run_id"))
    print("a look says:", run.path.exists())
    start = time.monotonic()
    claiming.confirm_shared(run, "token", host="guest", timeout_s=20)
    print(f"confirmed after {time.monotonic() - start:.3f} s", flush=True)
    (signals / "moment").write_text(str(time.time() + 3))
else:
    wait_for("looked")
    run, _ = claiming.create_run(experiment, "token")
    (signals / "run_id").write_text(run.run_id)
