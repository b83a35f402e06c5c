"""The demo, of which one rank kills itself: DIES_AT="step 30 1" is rank 1 after its step 30.

DIES_AT="updated 3 0" is rank 0 at the end of epoch 3, its average updated and nothing saved; "saved 3 0" is right after that.
"""

from __future__ import annotations

import os
import signal

import runmgr
from runmgr.examples import digits


def die_at(moment: str, number: int, rank: int) -> None:
    step = 0
    restore, should_stop, save = runmgr.Run.restore, runmgr.Run.should_stop, runmgr.Run.save

    def now(run, passed, count):
        if (passed, count, run.rank) == (moment, number, rank):
            os.kill(os.getpid(), signal.SIGKILL)

    def restore_and_note(run, state):
        nonlocal step
        progress = restore(run, state)
        step = progress.step
        return progress

    def ask_and_count(run):
        nonlocal step
        step += 1
        now(run, "step", step)
        return should_stop(run)

    def save_between(run, state, *, epoch, **more):
        now(run, "updated", epoch)
        handle = save(run, state, epoch=epoch, **more)
        now(run, "saved", epoch)
        return handle

    runmgr.Run.restore, runmgr.Run.should_stop, runmgr.Run.save = restore_and_note, ask_and_count, save_between


if __name__ == "__main__":
    if at := os.environ.get("DIES_AT"):
        name, when, who = at.split()
        die_at(name, int(when), int(who))
    digits.main()
