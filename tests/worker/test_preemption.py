"""A signal that goes to a training's DataLoader as well, as torchrun and Slurm send it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from children import Child
from torch.utils.data import DataLoader, TensorDataset

import runmgr


def until_stopped(tell, root, worker_init_fn):
    loader = DataLoader(
        TensorDataset(torch.arange(100_000)), batch_size=1, num_workers=2, worker_init_fn=worker_init_fn
    )
    with runmgr.start_run("stopped", ckpt_root_dir=root) as run:
        run.save({"steps": 0}, step=0)
        for step, _ in enumerate(loader, start=1):
            if step == 20:
                tell("runs")
            time.sleep(0.005 if step < 20 else 0.7)  # a step in which workers may end
            if run.should_stop():
                next(iter(loader))  # the workers of another one, which begin only now
                run.save({"steps": step}, step=step)
                return


def stop_all(root, worker_init_fn, number=signal.SIGTERM):
    child = Child(until_stopped, root, worker_init_fn, enter=os.setsid)
    child.read_until("runs".__eq__)
    os.killpg(child.pid, number)
    told = child.read_rest()
    os.waitpid(child.pid, 0)
    return runmgr.list_runs("stopped", root)[0], told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_training_whose_loader_gets_the_signal_too_saves_before_it_ends(root, number):
    run, told = stop_all(root, runmgr.ignore_stop_signals, number)
    assert told == "runs"
    assert run.status == "preempted"
    assert run.latest["step"] >= 20


def test_workers_that_end_with_the_signal_end_the_training_and_it_says_what_to_do(root):
    run, told = stop_all(root, None)
    assert (run.status, run.latest["step"]) == ("failed", 0)
    assert "SIGTERM went to the workers" in told
    assert "DataLoader(worker_init_fn=runmgr.ignore_stop_signals)" in told
    (report,) = (run.path / ".runmgr" / "failures").iterdir()
    assert "worker_init_fn=runmgr.ignore_stop_signals" in report.read_text()
