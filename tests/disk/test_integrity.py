"""No byte of a checkpoint can change without being noticed, and `runmgr verify` names the file."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from disk.syscalls import deny, in_child
from sizes import size
from torch import nn

import runmgr
from runmgr import cli
from runmgr.disk import checkpoints, directory, integrity
from runmgr.errors import CheckpointCorrupt

STEP = size(5, 1)  # of the bytes that are flipped; odd, so that each bit has its turn


@pytest.fixture
def saved():
    """A run with three small checkpoints; returns its directory and what it lists."""
    with runmgr.start_run("whole", keep=runmgr.Keep(last=None)) as run:
        for epoch in (1, 2, 3):
            run.save({"w": torch.full((4,), float(epoch))}, epoch=epoch)
    found = directory.RunDirectory(run.run_dir)
    return found, checkpoints.read_all(found)


def _rewrite(path, content):
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.scales
def test_every_single_flipped_byte_is_noticed(saved):
    run, entries = saved
    path = entries[0].path_in(run)
    content = path.read_bytes()
    unnoticed = []
    path.chmod(0o644)
    for position in range(0, len(content), STEP):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([content[position] ^ (1 << position % 8)]))
        with contextlib.suppress(CheckpointCorrupt):
            checkpoints.verify(run, entries[0])
            unnoticed.append(position)
        with path.open("r+b") as file:
            file.seek(position)
            file.write(content[position : position + 1])
    assert unnoticed == []
    checkpoints.verify(run, entries[0])


def test_a_thousand_random_corruptions_are_all_noticed(saved):
    run, entries = saved
    path, dice = entries[1].path_in(run), random.Random(7)
    content = path.read_bytes()
    path.chmod(0o644)
    for _ in range(1000):
        damaged = bytearray(content)
        kind = dice.choice(("flip", "zero", "cut", "insert", "shuffle"))
        start = dice.randrange(len(damaged))
        end = min(len(damaged), start + dice.choice((1, 16, 512)))
        if kind == "flip":
            for index in range(start, end):
                damaged[index] ^= dice.randrange(1, 256)
        elif kind == "zero":
            damaged[start:end] = bytes(end - start)
        elif kind == "cut":
            del damaged[start:end]
        elif kind == "insert":
            damaged[start:start] = dice.randbytes(end - start)
        else:
            other = dice.randrange(len(damaged) - (end - start))
            damaged[start:end], damaged[other : other + end - start] = (
                damaged[other : other + end - start],
                damaged[start:end],
            )
        if damaged == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt, match=path.name):
            checkpoints.verify(run, entries[1])


def test_the_damaged_record_is_named(saved):
    run, entries = saved
    path = entries[0].path_in(run)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        data = archive.read(name)
    content[content.index(data)] ^= 1
    _rewrite(path, content)
    with pytest.raises(CheckpointCorrupt, match=f"record '{name}'"):
        integrity.check_content(path)


def _verify(capsys, run, *options):
    status = cli.main(["verify", str(run.path), "--json", *options])
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    return status, [item["file"] for item in listed if item["problem"]]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "swap", "name"])
def test_verify_names_the_file(saved, capsys, damage):
    run, entries = saved
    one, other = (entry.path_in(run) for entry in entries[:2])
    assert _verify(capsys, run, "--deep") == (0, [])
    shallow = expected = [one.name]
    content = one.read_bytes()
    if damage == "flip":
        _rewrite(one, content.replace(torch.full((4,), 1.0).numpy().tobytes(), torch.full((4,), 9.0).numpy().tobytes()))
        shallow = []
    elif damage == "truncate":
        _rewrite(one, content[:-1])
    elif damage == "empty":
        _rewrite(one, b"")
    elif damage == "delete":
        one.unlink()
    elif damage == "swap":
        keep = one.with_suffix(".keep")
        os.rename(one, keep)
        os.rename(other, one)
        os.rename(keep, other)
        shallow = expected = [one.name, other.name]
    else:
        (run.path / "ckpt_latest.pth").unlink()
        shutil.copy(one, run.path / "ckpt_latest.pth")
        shallow = expected = [entries[2].object_name]
    assert _verify(capsys, run, "--deep") == (int(bool(expected)), expected)
    assert _verify(capsys, run) == (int(bool(shallow)), shallow)


def test_verify_reads_the_copies_where_links_do_not_work(capsys):
    def copied():
        deny("link", "linkat", error=errno.EPERM)
        with runmgr.start_run("copies", monitor="acc") as run:
            run.save({"x": torch.ones(1000)}, epoch=1, metrics={"acc": 1})
        return run.run_dir

    best = in_child(copied) / "ckpt_best.pth"
    assert cli.main(["verify", "copies", "--deep"]) == 0
    best.chmod(0o644)
    content = bytearray(best.read_bytes())
    content[content.find(torch.ones(100).numpy().tobytes())] ^= 1
    best.write_bytes(content)
    assert cli.main(["verify", "copies", "--deep"]) == 1
    assert f"{best} is damaged" in capsys.readouterr().out


def test_verify_does_not_blame_a_run_that_is_being_saved(capsys):
    with runmgr.start_run("live", monitor="acc") as run:
        ended = threading.Event()

        def look():
            codes = [cli.main(["verify", run.run_id]) for _ in range(30)]
            ended.set()
            return codes

        with ThreadPoolExecutor(1) as pool:
            codes = pool.submit(look)
            for epoch in itertools.count(1):
                run.save({"x": torch.ones(1000)}, epoch=epoch, metrics={"acc": epoch})
                if ended.is_set():
                    break
    assert set(codes.result()) == {0}, capsys.readouterr().out


def test_verify_reads_as_a_person_would_have_it(saved, capsys):
    run, entries = saved
    _rewrite(entries[0].path_in(run), b"")
    assert cli.main(["verify", str(run.path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("DAMAGED  0001-000001.pth  ckpt_epoch_1.pth\n")
    assert "it has 0 bytes" in out
    assert "ok       0001-000003.pth  ckpt_latest.pth, ckpt_epoch_3.pth\n" in out
    assert f"3 checkpoints of {run.run_id}, 1 damaged" in out


def test_the_plain_part_is_read_without_running_anything(saved, tmp_path):
    run, entries = saved
    found = integrity.contents(entries[1].path_in(run))
    assert (found["epoch"], found["step"], found["metrics"], found["run_id"]) == (2, None, {}, run.run_id)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"epoch": 5, "evil": Evil(), "model": nn.Linear(1, 1), "set": {1, 2}}, tmp_path / "evil.pth")
    assert integrity.contents(tmp_path / "evil.pth")["epoch"] == 5
    assert not (tmp_path / "ran").exists()
    (tmp_path / "none.pth").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointCorrupt, match=r"none\.pth"):
        integrity.contents(tmp_path / "none.pth")


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(capsys):
    with runmgr.start_run("pins") as run:
        path = str(run.run_dir)
        run.save({"w": torch.zeros(1)}, epoch=1)
        assert cli.main(["pin", path]) == 0
        for epoch in (2, 3, 4):
            run.save({"w": torch.zeros(1)}, epoch=epoch)
        (pinned,) = run.run_dir.glob("ckpt_pinned_epoch_1*")
        assert torch.load(pinned, weights_only=True)["epoch"] == 1
        objects = run.run_dir / ".runmgr/checkpoints"
        assert len(list(objects.iterdir())) == 2
        assert cli.main(["pin", path, "ckpt_epoch_9.pth"]) == 1
        assert "has no ckpt_epoch_9.pth; it has ['ckpt_latest.pth']" in capsys.readouterr().err
        assert cli.main(["unpin", path, pinned.name]) == 0
        run.save({"w": torch.zeros(1)}, epoch=5)
        assert len(list(objects.iterdir())) == 1
        assert {found.name for found in run.run_dir.glob("*.pth")} == {"ckpt_latest.pth"}
