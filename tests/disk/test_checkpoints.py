"""Which checkpoint is latest and best, which names and files stay, and what is believed of other attempts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from disk.holders import hold
from disk.shelves import names_of, open_shelf, save

from runmgr.disk import atomic, checkpoints, record
from runmgr.disk.metrics import is_better
from runmgr.disk.shelf import Keep
from runmgr.errors import CheckpointCorrupt, InvalidInput, Superseded


@pytest.mark.parametrize(
    ("new", "old", "mode", "better"),
    [
        (2, 1, "max", True), (1, 2, "max", False), (1, 1, "max", False), (1, 2, "min", True), (2, 2, "min", False),
        (math.nan, 1, "max", False), (math.inf, 1, "max", False), (-math.inf, 1, "min", False), (1, math.nan, "max", True),
        (1, None, "min", True), (None, 1, "max", False), (None, None, "max", False),
    ],
)  # fmt: skip
def test_ties_keep_the_older_and_what_is_not_finite_never_wins(new, old, mode, better):
    assert is_better(new, old, mode) is better


@pytest.mark.parametrize(
    ("keep", "accuracies", "expected"),
    [
        (Keep(), [1, 3, 2], {"latest": 3, "best": 2}),
        (Keep(last=0, best=0), [1, 3, 2], {"latest": 3, "best": 2}),
        (Keep(last=2), [3, 1, 2, 1], {"latest": 4, "best": 1, "epoch_1": 1, "epoch_3": 3, "epoch_4": 4}),
        (Keep(last=None), [1, 2], {"latest": 2, "best": 2, "epoch_1": 1, "epoch_2": 2}),
        (Keep(best=2), [2, 1, 3, 1], {"latest": 4, "best": 3, "epoch_1": 1, "epoch_3": 3}),
        (Keep(epochs=[2]), [1, 1, 1, 1], {"latest": 4, "best": 1, "epoch_2": 2}),
        (Keep(every_n_epochs=2), [9, 1, 1, 1, 1], {"latest": 5, "best": 1, "epoch_2": 2, "epoch_4": 4}),
        (Keep(), [math.nan, None, math.inf], {"latest": 3}),
    ],
)  # fmt: skip
def test_keep_decides_which_names_and_files_stay(run, keep, accuracies, expected):
    shelf = open_shelf(run, keep=keep)
    for epoch, accuracy in enumerate(accuracies, 1):
        save(shelf, epoch, acc=accuracy)
    assert names_of(run) == expected
    assert len(set(checkpoints.object_names(run))) == len(set(expected.values()))
    assert len(checkpoints.read_all(run)) == len(set(expected.values()))


def test_steps_are_kept_by_number_too(run):
    shelf = open_shelf(run, keep=Keep(every_n_steps=200))
    for step in (100, 200, 300, 400, 450):
        save(shelf, step=step)
    assert names_of(run) == {"latest": 450, "step_200": 200, "step_400": 400}


def test_a_save_in_mid_epoch_does_not_take_the_finished_epochs_name(run):
    shelf = open_shelf(run, keep=Keep(every_n_epochs=2))
    for epoch, step in ((1, 10), (2, 20), (2, 25), (3, 30)):
        save(shelf, epoch, step)
    assert torch.load(run.path / "ckpt_epoch_2.pth", weights_only=True)["step"] == 20
    assert names_of(run) == {"latest": 3, "epoch_2": 2}


def test_an_epoch_that_is_done_again_replaces_its_name(run):
    save(open_shelf(run, keep=Keep(epochs=[1])), 1, 10, acc=1)
    save(open_shelf(run, keep=Keep(epochs=[1])), 1, 10, acc=2)
    assert torch.load(run.path / "ckpt_epoch_1.pth", weights_only=True)["acc"] == 2
    assert len(list(checkpoints.object_names(run))) == 1


def test_order_is_by_number_not_by_text_or_time(run):
    shelf = open_shelf(run, keep=Keep(last=None))
    for epoch in range(1, 12):
        path = save(shelf, epoch).path_in(run)
        os.utime(path, (1_000_000 - epoch, 1_000_000 - epoch))
    assert [entry.epoch for entry in checkpoints.read_all(run)] == list(range(1, 12))


def test_members_of_an_average_stay_as_long_as_a_kept_checkpoint_names_them(run):
    shelf = open_shelf(run)
    member = save(shelf, 1)
    save(shelf, 2, members=(member.object_name,))
    save(shelf, 3, members=(member.object_name,))
    assert member.path_in(run).exists()
    save(shelf, 4)
    assert not member.path_in(run).exists()


def test_only_what_the_run_recorded_is_ever_removed(run):
    (run.path / "ckpt_mine.pth").write_text("mine")
    (run.objects_path / "notes.txt").write_text("mine too")
    shelf = open_shelf(run)
    for epoch in range(1, 4):
        save(shelf, epoch)
    open_shelf(run)
    assert (run.path / "ckpt_mine.pth").read_text() == "mine"
    assert (run.objects_path / "notes.txt").exists()


@pytest.mark.parametrize(
    "wrong", [{"last": -1}, {"best": -1}, {"every_n_epochs": 0}, {"every_n_steps": True}, {"last": 1.5}]
)
def test_numbers_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Keep(**wrong)


def test_all_names_of_a_checkpoint_are_one_file(run):
    path = save(open_shelf(run, keep=Keep(epochs=[1])), 1, acc=1).path_in(run)
    names = [run.path / f"ckpt_{name}.pth" for name in ("latest", "best", "epoch_1")]
    assert {name.stat().st_ino for name in names} == {path.stat().st_ino}


def test_an_attempt_that_was_taken_over_publishes_nothing_and_is_not_read(run):
    old = open_shelf(run)
    reported = save(old, 1, acc=1)
    late = old.next(epoch=9, metrics={"acc": 9.0})
    new = open_shelf(run)
    torch.save({"epoch": 9, "step": None, "acc": 9}, late.path_in(run))
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        old.publish(late)
    with pytest.raises(Superseded):
        old.next(epoch=10)
    assert [entry.order for entry in checkpoints.read_all(run)] == [reported.order]
    assert names_of(run) == {"latest": 1, "best": 1}
    assert new.latest == reported


def test_a_name_that_a_late_predecessor_swung_is_repaired(run):
    old = open_shelf(run)
    good = save(old, 1)
    late = run.objects_path / "0001-000077.pth"
    torch.save({"epoch": 77, "step": 0}, late)
    atomic.point_name(run.path / "ckpt_latest.pth", late)
    new = open_shelf(run)
    assert names_of(run) == {"latest": 1}
    assert not late.exists()
    assert new.latest.order == good.order


def test_left_over_temporaries_and_unrecorded_objects_are_swept_at_the_next_start(run):
    save(open_shelf(run), 1)
    litter = [
        run.objects_path / f"0001-000002.pth{atomic.TEMPORARY}1-a", run.objects_path / "0001-000002.pth",
        run.path / f"ckpt_latest.pth{atomic.TEMPORARY}1-a", run.attempts_path / f"0001.json{atomic.TEMPORARY}1-a",
    ]  # fmt: skip
    for path in litter:
        path.write_text("half")
    open_shelf(run)
    assert [path for path in litter if path.exists()] == []
    assert names_of(run) == {"latest": 1}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "grown", "swapped"])
def test_verify_finds_damage(run, damage):
    shelf = open_shelf(run, keep=Keep(last=None))
    other, entry = save(shelf, 1), save(shelf, 2)
    checkpoints.verify(run, entry)
    path = entry.path_in(run)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-10]
    elif damage == "flipped":
        content[content.index(b"epoch")] ^= 1
    elif damage == "emptied":
        content.clear()
    elif damage == "grown":
        content += b"x"
    path.unlink()
    if damage == "swapped":
        shutil.copy(other.path_in(run), path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match=path.name):
        checkpoints.verify(run, entry)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"checkpoints": 1}', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("attempt", [1, 2])
def test_a_lost_or_damaged_record_is_rebuilt_from_the_files(run, content, attempt):
    save(open_shelf(run, keep=Keep(last=None)), 1, 10, acc=1)
    save(open_shelf(run, keep=Keep(last=None)), 2, 20, acc=2)
    before = checkpoints.read_all(run)
    path = run.attempt_path(attempt)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    after = checkpoints.read_all(run)
    facts = ("order", "epoch", "step", "metrics", "size_bytes", "digest", "kind")
    assert [[getattr(entry, name) for name in facts] for entry in after] == [
        [getattr(entry, name) for name in facts] for entry in before
    ]
    assert _owned(after) == _owned(before)
    third = open_shelf(run, keep=Keep(last=None))
    assert third.attempt.number == 3
    assert "checkpoints" in json.loads(path.read_text())
    save(third, 3)
    assert names_of(run) == {"latest": 3, "best": 2, "epoch_1": 1, "epoch_2": 2, "epoch_3": 3}


def _owned(entries):
    return {name: entry.order for entry in entries for name in entry.names}


def test_fields_of_a_later_version_are_read_over(run):
    save(open_shelf(run), 1)
    path = run.attempt_path(1)
    content = json.loads(path.read_text())
    content["new"] = content["checkpoints"][0]["new"] = {"a": 1}
    path.write_text(json.dumps(content))
    assert [entry.epoch for entry in checkpoints.read_all(run)] == [1]


def test_rivals_for_an_attempt_get_different_numbers(run):
    numbers = [record.Attempt.begin(run, {}).number for _ in range(3)]
    assert numbers == record.attempt_numbers(run) == [1, 2, 3]


def test_status_is_what_the_record_says_but_a_dead_writer_is_lost(run):
    assert record.status_of(run, {}) == "unknown"
    assert record.status_of(run, {"status": "completed"}) == "completed"
    assert record.status_of(run, {"status": "running"}) == "lost"
    pid = hold(run)
    try:
        assert record.status_of(run, {"status": "running"}) == "running"
        old = time.time() - 3 * record.LEASE_S
        os.utime(run.lease_path, (old, old))
        assert record.status_of(run, {"status": "running"}) == "lost"
    finally:
        os.kill(pid, signal.SIGKILL)
    os.utime(run.lease_path)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert record.status_of(run, {"status": "running"}) == "lost"
    os.waitpid(pid, 0)
