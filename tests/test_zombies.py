"""A rank 0 that was stopped in the middle of a save and wakes up after another took its run changes nothing for anybody."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import zombies
from children import Child
from sizes import size

from runmgr.disk import directory

MOMENTS = size(6, 50)


@pytest.mark.scales
@pytest.mark.timeout(600)
def test_a_stopped_rank_0_that_wakes_up_changes_nothing(root):
    dice = random.Random(0)
    late = sum(_wake_up_a_zombie(root, f"launch-{moment}", dice.random() / 20) for moment in range(MOMENTS))
    print(f"{MOMENTS} moments, {late} late commits")


def _wake_up_a_zombie(root, launch, after_s):
    """Returns how many commits of the zombie were too late."""
    go_on, wake = os.pipe()
    first = Child(zombies.save_until_superseded, launch)
    second = None
    try:
        first.read_until(lambda text: text.count(" ") >= 3)
        time.sleep(after_s)
        os.kill(first.pid, signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)
        second = Child(zombies.take_over, launch, go_on)
        start = int(second.read_until(lambda text: "took over" in text).split()[0])
        run = directory.RunDirectory(max((root / "zombies").glob("RUN_*")))
        os.kill(first.pid, signal.SIGCONT)
        *reported, end = first.read_rest().split(" ")
        assert end == "Superseded", first.text
        assert start - 1 <= max(map(int, reported)) <= start, (
            "what was reported was there, and no more was reported after"
        )
        zombies.check_what_counts(run, start)
        os.write(wake, b"x")
        second.read_until(lambda text: text.endswith("\n"))
        zombies.check_names(run, start + 3)
    finally:
        os.close(wake)  # the second goes on
        os.close(go_on)
        for child in filter(None, (first, second)):
            child.end()
    return zombies.restore_once_more(run.run_id, start + 3)
