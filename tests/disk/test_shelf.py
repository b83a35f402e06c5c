"""What a publish leaves when it fails half-way, what later attempts believe, what damage costs, and what retention spares."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib

import pytest
import torch
from disk.shelves import damage, names_of, open_shelf, save
from torch import nn

import runmgr
from runmgr import cli
from runmgr.disk import atomic, checkpoints, directory, pins, record
from runmgr.disk import shelf as shelf_module
from runmgr.disk.shelf import Keep
from runmgr.errors import CheckpointCorrupt, CheckpointNotFound, InvalidInput, RankFailed, Superseded


def _objects(run):
    return sorted(checkpoints.object_names(run))


def _orders(entries):
    return [entry.order for entry in entries]


def _all_is_there(run):
    """Whether every listed object lies on disk, nothing else does, and each name holds what it should."""
    entries = checkpoints.listed(run)
    assert _objects(run) == [entry.object_name for entry in entries]
    for entry in entries:
        checkpoints.verify(run, entry)
        assert all(checkpoints.is_same_content(entry.path_in(run), run.path / name) for name in entry.names)
    assert {path.name for path in run.path.glob("*.pth")} == {name for entry in entries for name in entry.names}
    return True


@contextlib.contextmanager
def _failing(monkeypatch, owner, name, error, *, when=lambda *_: True, after=False):
    """Let a function raise `error` in the block, instead of its work or behind it."""
    original = getattr(owner, name)

    def function(*args, **options):
        if not when(*args):
            return original(*args, **options)
        if after:
            original(*args, **options)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        yield


FAULTS = [OSError(errno.ENOSPC, "No space left on device", "x"), KeyboardInterrupt()]


# What is believed of other attempts


def _wakes_up_late(first):
    """Let the shelf's next commit be overtaken by attempt 2, which begins and saves nothing."""
    write, second = first.attempt.write, []

    def stalled():
        if not second:
            second.append(open_shelf(first.run))
        write()

    first.attempt.write = stalled
    with pytest.raises(Superseded):
        save(first, 2, acc=2)
    return second[0]


def test_what_one_attempt_refused_no_later_one_believes(run):
    first = open_shelf(run)
    reported = save(first, 1, acc=1)
    _wakes_up_late(first)
    for _ in range(2):
        later = open_shelf(run)
        assert _orders(later.checkpoints) == [reported.order]
        assert later.latest.order == reported.order
        assert _objects(run) == [reported.object_name]
        assert names_of(run) == {"latest": 1, "best": 1}
    save(later, 2, acc=3)
    assert _all_is_there(run)


def test_an_attempt_that_died_before_it_judged_has_refused_nothing(run):
    first = open_shelf(run)
    save(first, 1, acc=1)
    record.Attempt.begin(run, {})
    late = first.run.objects_path / "0001-000002.pth"
    with pytest.raises(Superseded):
        save(first, 2)
    torch.save({"epoch": 2, "step": None, "metrics": {"acc": 2}}, late)
    with pytest.raises(Superseded):
        first.publish(checkpoints.Checkpoint(attempt=1, sequence=2, epoch=2, metrics={"acc": 2.0}))
    third = open_shelf(run)
    assert [entry.epoch for entry in third.checkpoints] == [2]
    assert _all_is_there(run)


def test_what_retention_dropped_counts_again_when_nothing_newer_is_there(run, monkeypatch):
    shelf = open_shelf(run)
    old = save(shelf, 1, acc=1)
    is_object = lambda path: path.parent == run.objects_path  # noqa: E731
    with _failing(monkeypatch, atomic, "remove", FAULTS[0], when=is_object), pytest.raises(OSError, match="No space"):
        save(shelf, 2, acc=2)
    assert [entry.epoch for entry in checkpoints.read_all(run)] == [2]
    (run.objects_path / "0001-000002.pth").unlink()
    again = open_shelf(run)
    assert _orders(again.checkpoints) == [old.order]
    save(again, 2, acc=3)
    open_shelf(run)
    assert _objects(run) == ["0002-000001.pth"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_record_that_cannot_be_read_for_once_stops_the_start_and_is_not_overwritten(run, monkeypatch, code):
    shelf = open_shelf(run, keep=Keep(last=2))
    for epoch in (1, 2, 3):
        save(shelf, epoch, acc=epoch)
    before = run.attempt_path(1).read_bytes()
    error = OSError(code, os.strerror(code), str(run.attempt_path(1)))
    is_record = lambda path: path == run.attempt_path(1)  # noqa: E731
    with (
        _failing(monkeypatch, pathlib.Path, "read_bytes", error, when=is_record),
        pytest.raises(OSError, match=r"0001\.json"),
    ):
        open_shelf(run)
    assert run.attempt_path(1).read_bytes() == before
    assert [entry.epoch for entry in open_shelf(run).checkpoints] == [2, 3]


def test_one_run_that_cannot_be_read_does_not_hide_the_others(monkeypatch):
    for _ in range(2):
        with runmgr.start_run("several") as run:
            run.save({"a": 1}, epoch=1)
    error = OSError(errno.EIO, "Input/output error")
    is_its = lambda path: run.run_dir in path.parents  # noqa: E731
    with _failing(monkeypatch, os, "open", error, when=lambda path, *_: is_its(pathlib.Path(path))):
        assert [info.status for info in runmgr.list_runs("several")] == ["unreadable", "completed"]
    with (
        _failing(monkeypatch, pathlib.Path, "read_bytes", error, when=is_its),
        pytest.raises(RankFailed, match="Input/output"),
    ):
        runmgr.start_run("several", run_id=run.run_id)
    assert json.loads((run.run_dir / "run.json").read_text())["status"] == "completed"


def test_what_an_attempt_with_a_lost_record_had_removed_is_not_missing(run):
    save(open_shelf(run), 1, acc=1)
    save(open_shelf(run), 2, acc=2)
    assert _all_is_there(run)
    run.attempt_path(2).unlink()
    assert _all_is_there(run)
    open_shelf(run)
    assert _all_is_there(run)


def test_a_damaged_checkpoint_whose_record_is_lost_is_named_by_verify_and_kept(capsys):
    with runmgr.start_run("lost") as started:
        started.save({"a": 1}, epoch=1)
    run = directory.RunDirectory(started.run_dir)
    damage(started.path("latest"))
    run.attempt_path(1).unlink()
    for _ in range(2):
        (entry,) = checkpoints.listed(run)
        with pytest.raises(CheckpointCorrupt, match=entry.object_name):
            checkpoints.verify(run, entry)
        for options in ([], ["--deep"]):
            assert cli.main(["verify", str(run.path), *options]) == 1
            assert f"DAMAGED  {entry.object_name}" in capsys.readouterr().out
        open_shelf(run)
        assert _objects(run) == [entry.object_name]
    again = runmgr.start_run("lost", run_id=started.run_id)
    with pytest.raises(CheckpointCorrupt, match="none of the 1 checkpoints"):
        again.restore({})
    again.finish()


# What a publish that fails half-way leaves


@pytest.mark.parametrize("error", FAULTS, ids=["full", "interrupted"])
def test_a_checkpoint_whose_record_was_refused_does_not_count_and_leaves_no_file(run, monkeypatch, error):
    shelf = open_shelf(run)
    save(shelf, 1, acc=1)
    before = run.attempt_path(1).read_bytes()
    is_record = lambda path, *_: path == run.attempt_path(1)  # noqa: E731
    with _failing(monkeypatch, atomic, "write_json", error, when=is_record), pytest.raises(type(error)):
        save(shelf, 2, acc=9)
    assert run.attempt_path(1).read_bytes() == before
    assert (shelf.latest.epoch, shelf.best.epoch) == (1, 1)
    assert _all_is_there(run)
    shelf.attempt.write()  # as the end of the run does
    assert _all_is_there(run)
    save(shelf, 3, acc=2)
    assert names_of(run) == {"latest": 3, "best": 3}
    assert _all_is_there(run)


@pytest.mark.parametrize("error", FAULTS, ids=["full", "interrupted"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_commit_that_reached_the_disk_and_failed_all_the_same_loses_nothing(run, monkeypatch, error, goes_on):
    shelf = open_shelf(run)
    save(shelf, 1, acc=1)
    is_record = lambda path, *_: path == run.attempt_path(1)  # noqa: E731
    with _failing(monkeypatch, atomic, "write_json", error, when=is_record, after=True), pytest.raises(type(error)):
        save(shelf, 2, acc=9)
    for name in _objects(run):
        torch.load(run.objects_path / name, weights_only=True)
    assert _objects(run) == ["0001-000001.pth", "0001-000002.pth"]
    assert [entry.epoch for entry in checkpoints.listed(run)] == [2]
    if goes_on:
        save(shelf, 3, acc=2)
        assert names_of(run) == {"latest": 3, "best": 3}
    else:
        assert [entry.epoch for entry in open_shelf(run).checkpoints] == [2]
        assert names_of(run) == {"latest": 2, "best": 2}
    assert _all_is_there(run)


@pytest.mark.parametrize("error", FAULTS, ids=["full", "interrupted"])
def test_names_that_could_not_be_swung_are_swung_by_the_next_save(run, monkeypatch, error):
    shelf = open_shelf(run)
    save(shelf, 1, acc=1)
    with _failing(monkeypatch, atomic, "point_name", error), pytest.raises(type(error)):
        save(shelf, 2, acc=9)
    save(shelf, 3, acc=2)
    assert json.loads(run.record_path.read_text())["best"]["metrics"] == {"acc": 9.0}
    assert names_of(run) == {"latest": 3, "best": 2}
    assert _all_is_there(run)


@pytest.mark.parametrize("error", FAULTS, ids=["full", "interrupted"])
def test_what_could_not_be_removed_is_removed_by_the_next_save(run, monkeypatch, error):
    shelf = open_shelf(run)
    save(shelf, 1, acc=1)
    is_object = lambda path: path.parent == run.objects_path  # noqa: E731
    with _failing(monkeypatch, atomic, "remove", error, when=is_object), pytest.raises(type(error)):
        save(shelf, 2, acc=2)
    save(shelf, 3, acc=3)
    assert _objects(run) == ["0001-000003.pth"]
    assert _all_is_there(run)


# What damage costs


def _damaged_best(keep):
    """Train two epochs, the second the best by far; then it is damaged, and a restart falls back to the first."""
    model = nn.Linear(2, 2)
    with runmgr.start_run("damaged", monitor="acc", keep=keep) as run:
        for epoch, accuracy in ((1, 1), (2, 9)):
            run.save({"net": model}, epoch=epoch, metrics={"acc": accuracy})
    damage(run.path("best"))
    return run, model


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_damaged_checkpoint_does_not_win_the_tie_against_the_epoch_done_again(restarts):
    keep = Keep(last=2)
    run, model = _damaged_best(keep)
    for _ in range(restarts):
        again = runmgr.start_run("damaged", run_id=run.run_id, monitor="acc", keep=keep)
        assert again.restore({"net": model}).epoch == 1
        assert torch.load(again.path("latest"), weights_only=True)["epoch"] == 1
        assert torch.load(again.path("best"), weights_only=True)["epoch"] == 1
        assert json.loads((run.run_dir / "run.json").read_text())["best"]["epoch"] == 1
        if restarts == 2:
            again.finish()
            again = runmgr.start_run("damaged", run_id=run.run_id, monitor="acc", keep=keep)
            assert again.restore({"net": model}, "best").epoch == 1
        again.finish()
    with runmgr.start_run("damaged", run_id=run.run_id, monitor="acc", keep=keep) as last:
        last.restore({"net": model})
        last.save({"net": model}, epoch=2, metrics={"acc": 9})
        last.save({"net": model}, epoch=3, metrics={"acc": 8})
        assert last.restore({"net": model}, "best").epoch == 2
        assert last.restore({"net": model}).epoch == 3
    assert _all_is_there(directory.RunDirectory(run.run_dir))


def test_a_damaged_checkpoint_stays_until_one_as_good_replaces_it():
    run, model = _damaged_best(Keep(last=2))
    damaged = "0001-000002.pth"
    with runmgr.start_run("damaged", run_id=run.run_id, monitor="acc") as again:
        found = directory.RunDirectory(again.run_dir)
        with pytest.raises(CheckpointCorrupt):
            again.restore({"net": model}, "best")
        again.restore({"net": model})
        again.save({"net": model}, epoch=2, metrics={"acc": 5})
        assert damaged in _objects(found)
        assert [torch.load(again.path(name), weights_only=True)["epoch"] for name in ("latest", "best")] == [2, 2]
        again.save({"net": model}, epoch=3, metrics={"acc": 9})
        assert damaged not in _objects(found)
        assert names_of(found) == {"latest": 3, "best": 3}


def test_a_checkpoint_that_only_seemed_damaged_counts_again_once_it_is_restored(monkeypatch):
    model = nn.Linear(2, 2)
    with runmgr.start_run("seemed", monitor="acc", keep=Keep(last=2)) as run:
        for epoch in (1, 2):
            run.save({"net": model}, epoch=epoch, metrics={"acc": epoch})
    is_newest = lambda _, entry, *__: entry.epoch == 2  # noqa: E731
    again = runmgr.start_run("seemed", run_id=run.run_id, monitor="acc", keep=Keep(last=2))
    with _failing(monkeypatch, checkpoints, "verify", OSError(errno.EIO, "Input/output error"), when=is_newest):
        assert again.restore({"net": model}).epoch == 1
    assert names_of(directory.RunDirectory(run.run_dir))["best"] == 1
    again.finish()
    with runmgr.start_run("seemed", run_id=run.run_id, monitor="acc", keep=Keep(last=2)) as last:
        assert last.restore({"net": model}).epoch == 2
        assert names_of(directory.RunDirectory(run.run_dir)) == {"latest": 2, "best": 2, "epoch_1": 1, "epoch_2": 2}
    assert _all_is_there(directory.RunDirectory(run.run_dir))


# A fork


def test_a_fork_is_durable_with_all_its_average_is_made_of_before_it_counts(monkeypatch):
    model = nn.Linear(2, 2)
    average = runmgr.BestAverage(model, k=3)
    with runmgr.start_run("parent", monitor="acc") as parent:
        for epoch in (1, 2, 3):
            average.update(epoch)
            parent.save({"net": model, "average": average}, epoch=epoch, metrics={"acc": epoch})
    events = []
    point_name, sync_directory, write = atomic.point_name, atomic.sync_directory, record.Attempt.write

    def note(event, function):
        def noting(*args):
            function(*args)
            events.append(event(*args))

        return noting

    monkeypatch.setattr(atomic, "point_name", note(lambda name, _: name.parent.name, point_name))
    monkeypatch.setattr(atomic, "sync_directory", note(lambda path: f"sync {path.name}", sync_directory))
    monkeypatch.setattr(record.Attempt, "write", note(lambda attempt: len(attempt.content["checkpoints"]), write))
    with runmgr.start_run("parent", fork_from=parent.run_id, monitor="acc") as fork:
        events = events[: events.index(4) + 1]
        assert [event for event in events if isinstance(event, int)] == [0, 4], "the file and its members count at once"
        assert events.count("checkpoints") == 4
        assert "sync checkpoints" in events[len(events) - events[::-1].index("checkpoints") :]
        average = runmgr.BestAverage(model, k=3)
        assert fork.restore({"net": model, "average": average}).epoch == 3
        assert len(average.members) == 3
        average.averaged_state_dict()


# Retention


def test_a_second_save_of_an_epoch_without_step_belongs_to_the_next_one(run):
    shelf = open_shelf(run, keep=Keep(every_n_epochs=1))
    finished = save(shelf, 1, acc=1)
    save(shelf, 1, acc=0.5)
    assert finished.path_in(run).samefile(run.path / "ckpt_epoch_1.pth")
    assert shelf.latest.sequence == 2
    save(shelf, 2, acc=2)
    assert _orders(shelf.checkpoints) == [(1, 1), (1, 3)]
    assert _all_is_there(run)


def test_every_one_of_several_has_a_name_also_in_mid_epoch_without_step(run):
    shelf = open_shelf(run, keep=Keep(last=None))
    for accuracy in (1, 2, 3):
        save(shelf, 1, acc=accuracy)
    for entry in shelf.checkpoints:
        assert set(entry.names) - {"ckpt_latest.pth", "ckpt_best.pth"}
    assert _all_is_there(run)


@pytest.mark.parametrize("restores", [True, False])
def test_an_epoch_done_again_with_more_steps_takes_its_name_from_the_line_that_was_left(restores):
    keep = Keep(every_n_epochs=2)
    state = {"a": 1}
    with runmgr.start_run("ranks", keep=Keep(last=None)) as run:
        for epoch in (1, 2, 3):
            run.save(state, epoch=epoch, step=10 * epoch)
    with runmgr.start_run("ranks", run_id=run.run_id, keep=keep) as again:
        if restores:
            assert again.restore(state, "ckpt_epoch_1.pth").epoch == 1
        else:
            again._must_restore = False
        again.save(state, epoch=2, step=25)
        again.save(state, epoch=2, step=28)
        again.save(state, epoch=3, step=35)
        assert torch.load(run.run_dir / "ckpt_epoch_2.pth", weights_only=True)["step"] == 25
        assert [entry.step for entry in again._writer.shelf.checkpoints] == [25, 35]
    with runmgr.start_run("ranks", run_id=run.run_id, keep=keep) as last:
        assert last.restore(state, "ckpt_epoch_2.pth").step == 25
        last.save(state, epoch=2, step=27)
        assert torch.load(run.run_dir / "ckpt_epoch_2.pth", weights_only=True)["step"] == 25


def test_objects_that_an_average_in_memory_holds_stay_until_it_lets_go(run):
    shelf = open_shelf(run)
    member = save(shelf, 1)
    shelf.held = frozenset({member.object_name})
    save(shelf, 2)
    assert member.path_in(run).exists()
    shelf.held = frozenset()
    save(shelf, 3)
    assert not member.path_in(run).exists()
    assert _all_is_there(run)


def test_a_pin_that_retention_outran_is_taken_back(run, monkeypatch):
    shelf = open_shelf(run)
    save(shelf, 1)
    _pin_too_late(run, "ckpt_latest.pth", monkeypatch)
    assert pins.pinned_objects(run) == set()
    assert list(run.path.glob("ckpt_pinned*")) == []


def test_a_pin_that_is_taken_back_takes_nothing_from_one_that_is_being_set(run, monkeypatch):
    shelf = open_shelf(run, keep=Keep(last=2))
    save(shelf, 1)
    save(shelf, 2)
    create_empty = atomic.create_empty

    def after_the_other(path):
        monkeypatch.setattr(atomic, "create_empty", create_empty)
        _pin_too_late(run, "ckpt_epoch_1.pth", monkeypatch)
        create_empty(path)

    monkeypatch.setattr(atomic, "create_empty", after_the_other)
    pins.pin(run, "ckpt_latest.pth")
    assert pins.pinned_objects(run) == {"0001-000002.pth"}


def _pin_too_late(run, name, monkeypatch):
    """Set a pin whose checkpoint retention removes meanwhile."""
    point_name = atomic.point_name

    def too_late(public, target):
        point_name(public, target)
        target.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "point_name", too_late)
        with pytest.raises(CheckpointNotFound, match=f"has no {name}"):
            pins.pin(run, name)


@pytest.mark.parametrize("name", ["ckpt_pinned_epoch_1_0001-000001.pth", "0001-000001.pth"])
def test_a_pin_whose_object_is_gone_can_be_taken_back(run, monkeypatch, name):
    shelf = open_shelf(run)
    save(shelf, 1)
    listing = shelf_module.pinned_objects

    def pinned_right_after(given):
        found = listing(given)
        pins.pin(run, "ckpt_latest.pth")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(shelf_module, "pinned_objects", pinned_right_after)
        save(shelf, 2)
    assert _objects(run) == ["0001-000002.pth"]
    assert torch.load(run.path / "ckpt_pinned_epoch_1_0001-000001.pth", weights_only=True)["epoch"] == 1
    assert pins.unpin(run, name).order == (1, 1)
    assert pins.pinned_objects(run) == set()
    assert list(run.path.glob("ckpt_pinned*")) == []
    with pytest.raises(CheckpointNotFound):
        pins.unpin(run, name)


@pytest.mark.parametrize("epochs", [5, ("10",), "10", (1.5,), (True,), (-1,), None])
def test_epochs_that_are_no_whole_numbers_are_refused(epochs):
    with pytest.raises(InvalidInput, match="epochs"):
        Keep(epochs=epochs)
    assert Keep(epochs=range(3)).epochs == (0, 1, 2)


def test_names_that_a_late_predecessor_moved_or_removed_are_right_after_the_next_publish(run):
    first = open_shelf(run, keep=Keep(last=3))
    save(first, 1, acc=1)
    save(first, 2, acc=5)
    second = open_shelf(run, keep=Keep(last=3))
    save(second, 3, acc=2)
    atomic.point_name(run.path / "ckpt_best.pth", second.checkpoints[0].path_in(run))  # it woke up behind its last look
    atomic.remove(run.path / "ckpt_epoch_2.pth")
    save(second, 4, acc=3)
    assert names_of(run) == {"latest": 4, "best": 2, "epoch_2": 2, "epoch_3": 3, "epoch_4": 4}
    assert _all_is_there(run)
