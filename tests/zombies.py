"""A rank 0 that saves until it learns that it was superseded, and the one that takes its run over meanwhile."""

from __future__ import annotations

import itertools
import os

import torch

import runmgr
from runmgr.disk import checkpoints

KEEP = runmgr.Keep(last=2, every_n_epochs=5)


def open_run(**options):
    return runmgr.start_run("zombies", monitor="acc", keep=KEEP, **options)


def save(run, who, epoch):
    state = {"who": who, "weights": torch.full((2000,), 1.0)}
    run.save(state, epoch=epoch, metrics={"acc": epoch % 7 + epoch / 1000})


def save_until_superseded(told, launch):
    """The first rank 0: tells each epoch that is reported as saved, and in the end what stopped it."""
    os.environ["RUNMGR_LAUNCH_ID"] = launch  # the same one takes over at once
    try:
        with open_run() as run:
            run.restore({})
            for epoch in itertools.count(1):
                save(run, "first", epoch)
                told(f"{epoch} ")
    except BaseException as error:  # noqa: BLE001  # the parent judges
        told(type(error).__name__ if isinstance(error, runmgr.Superseded) else repr(error))


def take_over(told, launch, go_on):
    """The second: goes on from where the first was, is there while it wakes up, then saves once more."""
    os.environ["RUNMGR_LAUNCH_ID"] = launch
    with open_run() as run:
        epoch = run.restore({}).epoch
        told(f"{epoch} ")
        for number in (1, 2):
            save(run, "second", epoch + number)
        told("took over")
        os.read(go_on, 1)
        save(run, "second", epoch + 3)
        told("\n")


def who_saved(path):
    content = torch.load(path, weights_only=True)
    return content["who"], content["epoch"]


def check_what_counts(run, start):
    """While the second goes on: its own work is the newest, and of the first's only what was there when it came."""
    entries = checkpoints.read_all(run)
    assert who_saved(entries[-1].path_in(run)) == ("second", start + 2)
    assert all(entry.epoch <= start for entry in entries if entry.attempt == 1)


def check_names(run, epoch):
    """Every public name is the object's that the records give it to, and latest is the second's."""
    owned = {name: entry for entry in checkpoints.read_all(run) for name in entry.names}
    assert {path.name for path in run.path.glob("*.pth")} == set(owned)
    for name, entry in owned.items():
        assert checkpoints.is_same_content(entry.path_in(run), run.path / name), name
        checkpoints.verify(run, entry)
    assert who_saved(run.public_path("latest")) == ("second", epoch)


def restore_once_more(run_id, epoch):
    """Resume the run, as a launch of its own; returns how many late commits of the first it had to disregard."""
    with open_run(run_id=run_id) as third:
        assert third.restore({}).epoch == epoch
        run = third._directory
        check_names(run, epoch)
    return sum(entry.epoch > epoch - 3 for entry in checkpoints.recorded(run, 1))
