"""The power fails at a random moment: everything that was not synced is gone, every save that was reported is there.

A real ext4 on a loop device is shut down without writing its journal, and mounted again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import signal
import struct
import subprocess
import time

import pytest
import torch
from processes import run_ranks, values
from sizes import size

import runmgr
from runmgr.disk import checkpoints, directory

CUTS = size(4, 100)
_SHUTDOWN, _WITHOUT_JOURNAL, _NEW_MOUNTS = 0x8004587D, 2, 0x00020000


def _run(*command):
    subprocess.run(command, check=True, capture_output=True)


def _cut_power(mount):
    descriptor = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_JOURNAL))
    finally:
        os.close(descriptor)


def _train(mount, run_id, reports, *, block):
    """Save without end, and tell each epoch that was reported as durable."""
    try:
        with contextlib.suppress(OSError, runmgr.RunError):
            run = runmgr.start_run("power", ckpt_root_dir=mount, run_id=run_id, monitor="acc")
            weights = torch.zeros(50_000)
            first = run.restore({"weights": weights}).epoch
            for epoch in range(first + 1, 10_000):
                weights.fill_(epoch)
                run.save({"weights": weights}, epoch=epoch, metrics={"acc": epoch % 7}, block=block)
                run.wait()
                os.write(reports, struct.pack("I", epoch))
    finally:
        os._exit(0)


@pytest.mark.scales
@pytest.mark.needs("root")
@pytest.mark.needs("mkfs.ext4")
@pytest.mark.timeout(600)
def test_what_was_reported_as_saved_is_there_after_a_power_cut(tmp_path):
    (saves,) = values(run_ranks(1, _cut_again_and_again, tmp_path, store="none", timeout_s=570))
    print(f"{CUTS} cuts, {saves} saves reported, none lost")


def _have_own_mounts():
    """Let this process mount for itself and its children alone; copies that others keep would outlast the cut."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_NEW_MOUNTS) == 0, os.strerror(ctypes.get_errno())
    _run("mount", "--make-rprivate", "/")


def _cut_again_and_again(_rank, folder):
    """Returns how many saves were reported."""
    _have_own_mounts()
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(96 << 20)
    _run("mkfs.ext4", "-qF", str(image))
    _run("mount", "-o", "loop,noauto_da_alloc", str(image), str(mount))
    dice, saves, run_id = random.Random(), 0, None
    for cut in range(CUTS):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            _train(mount, run_id, writing, block=cut % 2 == 0)
        os.close(writing)
        first = os.read(reading, 4)  # the first save is done, so there is something to lose
        time.sleep(dice.uniform(0, 0.05))
        _cut_power(mount)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reports = first
        while more := os.read(reading, 4096):
            reports += more
        os.close(reading)
        _run("umount", str(mount))
        _run("mount", "-o", "loop,noauto_da_alloc", str(image), str(mount))
        assert reports, "no save was reported before the cut"
        (reported,) = struct.unpack("I", reports[-4:])
        saves += len(reports) // 4
        (found,) = runmgr.list_runs("power", mount)
        run_id = found.run_id
        run = directory.RunDirectory(found.path)
        entries = checkpoints.read_all(run)
        assert entries[-1].epoch in {reported, reported + 1}
        for entry in entries:
            checkpoints.verify(run, entry)
            assert torch.load(entry.path_in(run), weights_only=True)["weights"].unique().tolist() == [entry.epoch]
        assert torch.load(found.path / "ckpt_latest.pth", weights_only=True)["epoch"] >= reported
    _run("umount", str(mount))
    return saves
