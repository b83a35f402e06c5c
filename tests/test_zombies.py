"""A rank 0 that was stopped in the middle of a save and wakes up after another took its run changes nothing for anybody."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time

import pytest
import torch

import runmgr
from runmgr.disk import checkpoints, directory

MOMENTS = int(os.environ.get("RUNMGR_ZOMBIES", "6"))  # 50 in CI
_KEEP = runmgr.Keep(last=2, every_n_epochs=5)


def _state(who):
    return {"who": who, "weights": torch.full((2000,), 1.0)}


def _open():
    return runmgr.start_run("zombies", monitor="acc", keep=_KEEP)


def _save(run, who, epoch):
    run.save(_state(who), epoch=epoch, metrics={"acc": epoch % 7 + epoch / 1000})


def _save_until_superseded(told):
    """The first rank 0: tells each epoch that is reported as saved, and in the end what stopped it."""
    with _open() as run:
        run.restore({})
        try:
            for epoch in itertools.count(1):
                _save(run, "first", epoch)
                told(f"{epoch} ")
        except BaseException as error:  # noqa: BLE001  # the parent judges
            told(type(error).__name__ if isinstance(error, runmgr.Superseded) else repr(error))


def _take_over(told, go_on):
    """The second: goes on from where the first was, is there while it wakes up, then saves once more."""
    with _open() as run:
        epoch = run.restore({}).epoch
        told(f"{epoch} ")
        for number in (1, 2):
            _save(run, "second", epoch + number)
        told("took over")
        os.read(go_on, 1)
        _save(run, "second", epoch + 3)
        told("\n")


class _Child:
    """A forked process that tells its parent things."""

    def __init__(self, launch, function, *more):
        self._reading, writing = os.pipe()
        self.text = ""
        self.pid = os.fork()
        if not self.pid:
            try:
                os.environ["RUNMGR_LAUNCH_ID"] = launch  # the same one takes over at once
                function(lambda text: os.write(writing, text.encode()), *more)
            finally:
                os._exit(0)
        os.close(writing)

    def read_until(self, enough):
        while not enough(self.text):
            part = os.read(self._reading, 1 << 16)
            assert part, self.text
            self.text += part.decode()
        return self.text

    def read_rest(self):
        while part := os.read(self._reading, 1 << 16):
            self.text += part.decode()
        return self.text

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reading)


def _who_saved(path):
    content = torch.load(path, weights_only=True)
    return content["who"], content["epoch"]


@pytest.mark.timeout(300)
def test_a_stopped_rank_0_that_wakes_up_changes_nothing(root):
    dice = random.Random(0)
    late = sum(_wake_up_a_zombie(root, f"launch-{moment}", dice.random() / 20) for moment in range(MOMENTS))
    print(f"{MOMENTS} moments, {late} late commits")


def _wake_up_a_zombie(root, launch, after_s):
    """Returns whether the zombie committed something that was too late."""
    go_on, wake = os.pipe()
    first = _Child(launch, _save_until_superseded)
    second = None
    try:
        first.read_until(lambda text: text.count(" ") >= 3)
        time.sleep(after_s)
        os.kill(first.pid, signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)
        second = _Child(launch, _take_over, go_on)
        start = int(second.read_until(lambda text: "took over" in text).split()[0])
        run = directory.RunDirectory(max((root / "zombies").glob("RUN_*")))
        os.kill(first.pid, signal.SIGCONT)
        *reported, end = first.read_rest().split(" ")
        assert end == "Superseded"
        assert start - 1 <= max(map(int, reported)) <= start, (
            "what was reported was there, and no more was reported after"
        )
        entries = checkpoints.read_all(run)
        assert _who_saved(entries[-1].path_in(run)) == ("second", start + 2)
        assert all(entry.epoch <= start for entry in entries if entry.attempt == 1)
        os.write(wake, b"x")
        second.read_until(lambda text: text.endswith("\n"))
        _check_names(run)
        assert _who_saved(run.public_path("latest")) == ("second", start + 3)
    finally:
        os.close(wake)  # the second goes on
        os.close(go_on)
        for child in filter(None, (first, second)):
            child.end()
    with runmgr.start_run("zombies", run_id=run.run_id, monitor="acc", keep=_KEEP) as third:
        assert third.restore({}).epoch == start + 3
        _check_names(run)
    return any(entry.epoch > start for entry in checkpoints.recorded(run, 1))


def _check_names(run):
    """Every public name is the object's that the records give it to."""
    owned = {name: entry for entry in checkpoints.read_all(run) for name in entry.names}
    assert {path.name for path in run.path.glob("*.pth")} == set(owned)
    for name, entry in owned.items():
        assert checkpoints.is_same_content(entry.path_in(run), run.path / name), name
        checkpoints.verify(run, entry)
