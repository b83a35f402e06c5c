"""The demo, with an event a step, flushed at once, so that a kill leaves some that the next start must hide."""

from __future__ import annotations

import os
import signal

import torch.distributed as dist

import runmgr
from runmgr.examples import digits


def after_each_step(act) -> None:
    """Call `act(run, step)` where the demo asks whether to stop."""
    step = 0
    restore, should_stop = runmgr.Run.restore, runmgr.Run.should_stop

    def restore_and_note(run, state):
        nonlocal step
        progress = restore(run, state)
        step = progress.step
        return progress

    def act_and_ask(run):
        nonlocal step
        step += 1
        act(run, step)
        return should_stop(run)

    runmgr.Run.restore, runmgr.Run.should_stop = restore_and_note, act_and_ask


def log_every_step() -> None:
    def log(run, step):
        run.log_scalars({"step": step}, step=step)
        run.tensorboard.flush()

    after_each_step(log)


def die_at(moment: str, number: int, rank: int) -> None:
    """Kill a rank: after "step" 30, in epoch 3 when its average is "updated" and nothing saved, or when that is "saved"."""
    save = runmgr.Run.save

    def now(run, passed, count):
        if (passed, count, run.rank) == (moment, number, rank):
            os.kill(os.getpid(), signal.SIGKILL)

    def save_between(run, state, *, epoch, **more):
        now(run, "updated", epoch)
        handle = save(run, state, epoch=epoch, **more)
        now(run, "saved", epoch)
        return handle

    after_each_step(lambda run, step: now(run, "step", step))
    runmgr.Run.save = save_between


def forget_dead_ranks() -> None:
    """Let each restart have keys of its own in torchrun's store; see docs/resume.md, which shows the same to users."""
    init = dist.init_process_group

    def init_with_own_keys(backend):
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        own = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        init(backend, store=own, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))

    dist.init_process_group = init_with_own_keys


if __name__ == "__main__":
    log_every_step()
    forget_dead_ranks()
    digits.main()
