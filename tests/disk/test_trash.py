"""Runs go to the trash and come back in one step; of a removal and a training on one run exactly one goes on."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from disk.holders import hold
from disk.shelves import open_shelf, save
from processes import kill
from sizes import size

from runmgr.disk import atomic, catalog, claiming, directory, lease, pins, record, trash
from runmgr.errors import InvalidInput, RunBusy, RunNotFound, RunProtected


@pytest.fixture
def experiment(run):
    return run.experiment


def _files(path):
    """Every file below a directory, with its content."""
    return {found.relative_to(path): found.read_bytes() for found in path.rglob("*") if found.is_file()}


def _in_children(count, function):
    """Let `count` processes call `function(number)` at one moment; returns what each returned, or the error's name."""
    reading, writing = os.pipe()
    go_reading, go_writing = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            try:
                os.close(go_writing)
                os.read(go_reading, 1)
                try:
                    answer = str(function(number))
                except Exception as error:  # noqa: BLE001  # the parent judges
                    answer = f"{type(error).__name__}"
                os.write(writing, f"{answer}\n".encode())
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(writing)
    os.close(go_writing)
    for pid in pids:
        os.waitpid(pid, 0)
    with os.fdopen(reading) as answers:
        os.close(go_reading)
        return answers.read().split()


def test_a_run_goes_and_comes_back_as_it_was_and_no_look_up_sees_it_meanwhile(run, experiment):
    save(open_shelf(run), epoch=1, acc=0.5)
    before = _files(run.path)
    place = trash.discard(run)
    assert place == experiment.trash_path / run.run_id
    assert not run.path.exists()
    assert _files(place) == before, "neither the claim nor the lease stays"
    assert catalog.list_runs("experiment", experiment.root) == []
    assert catalog.get_latest_run_id("experiment", experiment.root) is None
    (found,) = trash.list_trash("experiment", experiment.root)
    assert (found.run.run_id, found.run.experiment_name, found.run.path) == (run.run_id, "experiment", place)
    assert trash.restore(experiment, run.run_id) == run
    assert _files(run.path) == before
    assert trash.list_trash("experiment", experiment.root) == []


@pytest.mark.parametrize("is_marked", [True, False])
def test_ids_go_on_above_a_removed_newest_run(run, experiment, is_marked):
    newest = experiment.run("RUN_20991231_235959_999998")
    newest.path.mkdir()
    (newest.path / "ckpt_latest.pth").touch()  # as by a host whose clock is wrong, or by super-gradients in local time
    if is_marked:
        (experiment.last_run_id_path / newest.run_id).touch()
    else:
        shutil.rmtree(experiment.path / ".runmgr")
    trash.discard(newest)
    trash.discard(run)
    trash.purge_trash("experiment", ckpt_root_dir=experiment.root)
    assert claiming.create_run(experiment, "token")[0].run_id == "RUN_20991231_235959_999999"


def test_a_live_run_is_busy_and_stays(run):
    pid = hold(run)
    try:
        before = _files(run.path)
        start = time.monotonic()
        with pytest.raises(RunBusy, match=f"pid {pid}"):
            trash.discard(run)
        assert time.monotonic() - start < 8
        assert _files(run.path) == before
    finally:
        kill([pid])
        os.waitpid(pid, 0)


def test_a_run_whose_writer_is_dead_goes_at_once(run):
    pid = hold(run)
    kill([pid])
    os.waitpid(pid, 0)
    start = time.monotonic()
    trash.discard(run)
    assert time.monotonic() - start < 2


def test_of_many_removals_at_once_exactly_one_moves_the_run(run):
    answers = _in_children(8, lambda _: trash.discard(run).name)
    assert answers.count(run.run_id) == 1
    assert set(answers) <= {run.run_id, "RunNotFound", "RunBusy"}
    assert list(trash.trashed_ids(run.experiment)) == [run.run_id]
    assert not run.path.exists()


@pytest.mark.scales
def test_of_many_removals_and_starts_at_once_one_goes_on_and_no_part_of_a_run_is_left(tmp_path):
    experiment = directory.Experiment(tmp_path, "experiment")
    ends = set()
    for _ in range(size(3, 60)):
        run, _ = claiming.create_run(experiment, "token")

        def act(number, run=run):
            if number % 2:
                return trash.discard(run).name
            with record.told_if_gone(run):
                held = lease.Lease(run)
                held.acquire(takes_over=False)
                try:
                    record.Attempt.begin(run, held.facts(), after=held.after)
                    time.sleep(0.05)
                    assert run.attempts_path.is_dir(), "a live run was moved"
                finally:
                    held.release()
                return "started"

        answers = _in_children(6, act)
        assert set(answers) <= {run.run_id, "started", "RunNotFound", "RunBusy"}, answers
        ends |= set(answers)
        is_gone = run.run_id in answers
        assert run.path.exists() is not is_gone, sorted(run.path.rglob("*"))
        assert (run.run_id in trash.trashed_ids(experiment)) is is_gone
    assert run.run_id in ends or "started" in ends


def test_who_waits_for_a_run_that_goes_to_the_trash_is_told_and_leaves_nothing_there(run):
    def wait_for_it():
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with record.told_if_gone(run):
                    lease.Lease(run).acquire(takes_over=False)
            except (RunNotFound, RunBusy) as error:
                code = 0 if "restore" in str(error) or "moved to the trash" in str(error) else 2
            finally:
                os._exit(code)
        time.sleep(0.3)
        waiting.append(pid)

    waiting = []
    trash.discard(run, wait_for_it)
    assert os.waitpid(waiting[0], 0)[1] == 0
    assert not run.path.exists()


def test_a_lease_that_filelock_makes_a_directory_for_is_taken_back(run, monkeypatch):
    held = lease.Lease(run)
    acquire = held._lease.acquire

    def too_late(**options):
        trash.discard(run)
        return acquire(**options)  # makes RUN_…/.runmgr anew

    monkeypatch.setattr(held._lease, "acquire", too_late)
    with pytest.raises(RunNotFound, match=f"`runmgr restore experiment/{run.run_id}`"):
        held.acquire(takes_over=False)
    assert not run.path.exists()
    trash.restore(run.experiment, run.run_id)


def test_a_writer_whose_run_was_moved_away_is_told_and_puts_nothing_back(run):
    shelf = open_shelf(run)
    held = lease.Lease(run)
    held.acquire(takes_over=False)
    held.after = 0
    os.rename(run.path, run.path.with_name("elsewhere"))
    held._regain()
    with pytest.raises(RunNotFound, match="moved or removed"):
        shelf.next(epoch=1)
    held.release()
    assert not run.path.exists()


def test_a_pinned_run_stays_also_when_the_pin_comes_at_the_last_moment(run, monkeypatch):
    save(open_shelf(run), epoch=1)
    moved = atomic.move_directory

    def pin_and_move(path, target):
        if path == run.path:
            pins.pin(run, "ckpt_latest.pth")
        moved(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "move_directory", pin_and_move)
        with pytest.raises(RunProtected, match=r"1 of its checkpoints is pinned \(0001-000001.pth\)"):
            trash.discard(run)
    assert pins.pinned_objects(run) == {"0001-000001.pth"}
    assert record.attempt_numbers(run) == [1]
    assert not run.lease_path.exists()
    with pytest.raises(RunProtected):
        trash.discard(run)
    pins.unpin(run, "ckpt_latest.pth")
    trash.discard(run)


def test_what_cannot_be_moved_leaves_no_trace_of_the_try(run, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(run.path))

    before = _files(run.path)
    monkeypatch.setattr(atomic, "move_directory", refuse)
    with pytest.raises(PermissionError, match=run.run_id):
        trash.discard(run)
    assert _files(run.path) == before


def test_neither_trash_nor_experiment_ever_holds_two_runs_of_one_id(run, experiment):
    place = trash.discard(run)
    run.path.mkdir()
    (run.path / "run.json").write_text("{}")
    with pytest.raises(InvalidInput, match="already; rename or remove"):
        trash.restore(experiment, run.run_id)
    with pytest.raises(InvalidInput, match="lies in the trash"):
        trash.discard(run)
    assert (run.path / "run.json").read_text() == "{}"
    assert (place / ".runmgr" / "token").read_text() == "token"


def test_what_is_in_the_trash_a_link_or_not_there_is_refused(run, experiment):
    (experiment.path / "RUN_link").symlink_to(run.path)
    with pytest.raises(InvalidInput, match="symbolic link"):
        trash.discard(experiment.run("RUN_link"))
    with pytest.raises(RunNotFound, match="moved or removed"):
        trash.discard(experiment.run("RUN_20200101_000000_000000"))
    place = trash.discard(run)
    with pytest.raises(InvalidInput, match="in the trash already"):
        trash.discard(directory.RunDirectory(place))
    with pytest.raises(RunNotFound, match=f"did you mean {run.run_id}"):
        trash.restore(experiment, run.run_id[:-1] + "x")


def test_purge_deletes_what_is_named_or_all_and_nothing_else(run, experiment):
    others = [claiming.create_run(experiment, "token")[0] for _ in range(3)]
    save(open_shelf(run), epoch=1)
    outside = experiment.root / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (run.path / "link").symlink_to(outside)
    for one in (run, *others[:2]):
        trash.discard(one)
    assert trash.purge_trash("experiment", [run.run_id], experiment.root) == [run.run_id]
    assert set(trash.trashed_ids(experiment)) == {one.run_id for one in others[:2]}
    with pytest.raises(RunNotFound):
        trash.purge_trash("experiment", [run.run_id], experiment.root)
    half = experiment.purging_path / "RUN_half"  # left by one that was killed
    (half / "deep").mkdir(parents=True)
    assert len(trash.purge_trash("experiment", ckpt_root_dir=experiment.root)) == 2
    assert os.listdir(experiment.purging_path) == []
    assert (outside / "precious").exists()
    assert others[2].path.is_dir()


def test_purges_at_once_do_not_disturb_each_other(run, experiment):
    for _ in range(10):
        other, _ = claiming.create_run(experiment, "token")
        save(open_shelf(other), epoch=1)
        trash.discard(other)
    answers = _in_children(4, lambda _: len(trash.purge_trash("experiment", ckpt_root_dir=experiment.root)))
    assert sum(map(int, answers)) == 10
    assert os.listdir(experiment.trash_path) == os.listdir(experiment.purging_path) == []
