"""What a type checker knows of the public names. Never run; `test_packaging.py` gives it to mypy as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import torch

import runmgr

model = torch.nn.Linear(1, 1)
run = runmgr.start_run("x", ckpt_root_dir=Path("a"), config={"lr": 0.1}, mode="min", keep=runmgr.Keep(last=None))
with run as opened:
    assert_type(opened, runmgr.Run)
    progress = opened.restore({"net": model})
    assert_type(progress, runmgr.Progress)
    assert_type(progress.epoch, int)
    assert_type(progress.metrics, dict[str, float])
    assert_type(progress.checkpoint, Path | None)
    handle = opened.save({"net": model}, epoch=1, metrics={"loss": torch.zeros(())}, block=False)
    assert_type(handle, runmgr.SaveHandle)
    assert_type(opened.should_stop(), bool)
    assert_type(opened.path("best"), Path)
    assert_type((opened.rank, opened.is_main, opened.run_dir), tuple[int, bool, Path])

best = runmgr.BestAverage(model, k=3, mode="min")
best.update(metric=0.5)
with runmgr.ExponentialAverage(model, 0.99).applied():
    pass
assert_type(run.save_average(best), Path)
assert_type(runmgr.list_runs("x"), list[runmgr.RunInfo])
assert_type(runmgr.get_run("x", "RUN_1").status, str)
assert_type(runmgr.best_run("x", "loss", mode="min").best, dict[str, Any] | None)
assert_type(runmgr.average_checkpoints(["a.pth", Path("b.pth")]), Path)
assert_type(runmgr.__version__, str)
try:
    runmgr.find_run("x/best")
except runmgr.RunBusy as error:
    assert_type(error, runmgr.RunBusy)
    failure: runmgr.RunError = error

# Each of these is an error, or mypy complains of the comment.
runmgr.start_run("x", mode="most")  # type: ignore[arg-type]
runmgr.start_run("x", resume="always")  # type: ignore[arg-type]
runmgr.start_run("x", Path("a"))  # type: ignore[call-arg]
runmgr.start_run("x", tag="night")  # type: ignore[call-arg]
run.save([model], epoch=1)  # type: ignore[arg-type]
run.save({"net": model}, epoch="1")  # type: ignore[arg-type]
run.log_scalars({"loss": 1.0})  # type: ignore[call-arg]
run.save_average(model)  # type: ignore[arg-type]
runmgr.BestAverage(model, 3, "min")  # type: ignore[call-arg]
runmgr.Keep(5)  # type: ignore[call-arg]
runmgr.strat_run("x")  # type: ignore[attr-defined]
