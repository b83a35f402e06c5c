"""A run that is taken back leaves nothing, and takes nothing from a rival that is on its way into the same experiment."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import pytest

from runmgr.disk import atomic, claiming, directory
from runmgr.errors import NotShared

FORK = multiprocessing.get_context("fork")
ROUNDS = 60


def _start_and_give_up(root):
    experiment = directory.Experiment(root, "exp")
    for _ in range(ROUNDS):
        run, _ = claiming.create_run(experiment, "token")
        assert run.token_path.read_text() == "token"
        claiming.remove_unused(run)


def test_rivals_that_give_up_and_remove_the_new_experiment_disturb_nobody(tmp_path):
    rivals = [FORK.Process(target=_start_and_give_up, args=(tmp_path / "root",)) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
    assert [rival.exitcode for rival in rivals] == [0] * 4


def test_an_experiment_that_a_rival_takes_away_meanwhile_is_made_again(tmp_path, monkeypatch):
    experiment = directory.Experiment(tmp_path / "root", "exp")
    true_locked = atomic.locked

    def locked_too_late(path):
        shutil.rmtree(experiment.root)
        monkeypatch.setattr(atomic, "locked", true_locked)
        return true_locked(path)

    monkeypatch.setattr(atomic, "locked", locked_too_late)
    run, _ = claiming.create_run(experiment, "token")
    assert run.token_path.read_text() == "token"


def test_only_what_this_process_made_is_removed(tmp_path):
    experiment = directory.Experiment(tmp_path / "there" / "new", "exp")
    experiment.root.parent.mkdir()
    run, _ = claiming.create_run(experiment, "token")
    claiming.remove_unused(run)
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []
    experiment.path.mkdir(parents=True)
    run, _ = claiming.create_run(experiment, "token")
    claiming.remove_unused(run)
    assert os.listdir(experiment.root) == ["exp"]
    assert os.listdir(experiment.last_run_id_path) == [run.run_id]


def test_what_somebody_else_put_there_stays(tmp_path):
    experiment = directory.Experiment(tmp_path / "root", "exp")
    first, _ = claiming.create_run(experiment, "token")
    second, _ = claiming.create_run(experiment, "token")
    claiming.remove_unused(first)
    assert second.token_path.read_text() == "token"
    assert os.listdir(experiment.last_run_id_path) == [second.run_id]
    (experiment.path / "notes.txt").touch()
    claiming.remove_unused(second)
    assert os.listdir(experiment.path) == ["notes.txt"]
    third, _ = claiming.create_run(experiment, "token")
    assert third.token_path.exists()


@pytest.mark.parametrize("there", ["", "root", "root/exp"])
def test_a_host_with_a_disk_of_its_own_keeps_what_it_had(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    run = directory.Experiment(tmp_path / "root", "exp").run("RUN_20260101_000000_000000")
    with pytest.raises(NotShared, match="was missing there"):
        claiming.confirm_shared(run, "token", host="b", timeout_s=0.1)
    assert sorted(tmp_path.rglob("*")) == before
