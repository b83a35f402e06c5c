"""A run's shelf without a training: open it as the next attempt would, save, and see what the public names hold."""

from __future__ import annotations

import torch

from runmgr.disk import checkpoints, record
from runmgr.disk import shelf as shelf_module
from runmgr.disk.shelf import Keep


def open_shelf(run, *, keep=None, monitor="acc", mode="max"):
    """Begin the next attempt, as `start_run` does."""
    attempt = record.Attempt.begin(run, {})
    checkpoints.accept_predecessors(attempt)
    shelf = shelf_module.Shelf(attempt, record.RunRecord.read(run), monitor=monitor, mode=mode, keep=keep or Keep())
    shelf.sweep()
    shelf.repair_names()
    return shelf


def save(shelf, epoch=None, step=None, acc=None, **facts):
    """Write a small checkpoint and publish it."""
    metrics = {} if acc is None else {"acc": acc}
    checkpoint = shelf.next(epoch=epoch, step=step, metrics=metrics, **facts)
    torch.save({"epoch": epoch, "step": step, "metrics": metrics, "acc": acc}, checkpoint.path_in(shelf.run))
    return shelf.publish(checkpoint)


def names_of(run):
    """What each public name holds: its epoch, else its step."""
    found = {}
    for path in run.path.glob("*.pth"):
        content = torch.load(path, weights_only=True)
        found[path.name.removesuffix(".pth").removeprefix("ckpt_")] = content["epoch"] or content["step"]
    return found


def damage(path, position=0):
    """Flip a bit of a checkpoint, in place: it may be mapped."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
