"""The demo, with an event a step, flushed at once, so that a kill leaves some that the next start must hide."""

from __future__ import annotations

import runmgr
from runmgr.examples import digits


def log_every_step() -> None:
    step = 0
    restore, should_stop = runmgr.Run.restore, runmgr.Run.should_stop

    def restore_and_note(run, state):
        nonlocal step
        progress = restore(run, state)
        step = progress.step
        return progress

    def log_and_ask(run):
        nonlocal step
        step += 1
        run.log_scalars({"step": step}, step=step)
        run.tensorboard.flush()
        return should_stop(run)

    runmgr.Run.restore, runmgr.Run.should_stop = restore_and_note, log_and_ask


if __name__ == "__main__":
    log_every_step()
    digits.main()
