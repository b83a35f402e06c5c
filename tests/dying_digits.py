"""The demo, of which one rank kills itself: DIES_AT="step 30 1" is rank 1 after its step 30.

DIES_AT="updated 3 0" is rank 0 at the end of epoch 3, its average updated and nothing saved; "saved 3 0" is right after that.
"""

from __future__ import annotations

import os
import signal

from logged_digits import after_each_step

import runmgr
from runmgr.examples import digits


def die_at(moment: str, number: int, rank: int) -> None:
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


if __name__ == "__main__":
    if at := os.environ.get("DIES_AT"):
        name, when, who = at.split()
        die_at(name, int(when), int(who))
    digits.main()
