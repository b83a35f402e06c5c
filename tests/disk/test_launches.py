"""Which run a launch continues: named launches, requeued Slurm jobs, and rivals for one name."""

from __future__ import annotations

import contextlib

import pytest

from runmgr.disk import claiming, launches
from runmgr.disk.directory import Experiment
from runmgr.disk.launches import NamedLaunch, SlurmLaunch
from runmgr.ranks import SlurmStart


@pytest.fixture
def experiment(root):
    return Experiment(root, "x")


def start(experiment, *command, restart=0, step="batch", job="7"):
    """What a start does: the run it continues, or a new one. Returns the run's id."""
    launch = SlurmLaunch(experiment, SlurmStart(job, restart, step), list(command) or ["train.py"])
    run = launch.run()
    if run is None:
        run, _ = claiming.create_run(experiment, "token")
        assert launch.remember(run)
    return run.run_id


def test_before_the_first_requeue_every_start_of_a_job_is_a_new_training(experiment):
    assert len({start(experiment, step=step) for step in ("batch", "batch", "0", "0", "1")}) == 5


def test_after_a_requeue_trainings_go_on_in_their_order_and_the_next_one_is_new(experiment):
    before = [start(experiment) for _ in range(2)]
    for restart in (1, 2, 5):
        assert [start(experiment, restart=restart) for _ in range(2)] == before
    new = start(experiment, restart=5)
    assert new not in before
    assert [start(experiment, restart=6) for _ in range(4)][:3] == [*before, new]


def test_a_training_that_first_came_after_a_requeue_goes_on_after_the_next(experiment):
    first = start(experiment, "a")
    assert start(experiment, "a", restart=1) == first
    second = start(experiment, "b", restart=1)
    assert [start(experiment, name, restart=2) for name in "ab"] == [first, second]


def test_other_jobs_and_other_clusters_with_the_same_number_continue_nothing(experiment):
    first = start(experiment)
    assert start(experiment, job="70", restart=1) != first
    assert start(experiment, job="other-7", restart=1) != first


def test_the_command_tells_trainings_apart_whatever_their_order_or_step(experiment):
    a, b, c = (start(experiment, name, step=step) for name, step in (("a", "0"), ("b", "1"), ("c", "batch")))
    assert start(experiment, "c", restart=1) == c
    assert start(experiment, "b", restart=1, step="0") == b
    assert start(experiment, "a", restart=1, step="1") == a


def test_the_step_tells_equal_commands_apart(experiment):
    zero, one = (start(experiment, step=step) for step in "01")
    assert start(experiment, restart=1, step="1") == one
    assert start(experiment, restart=1, step="0") == zero


def test_a_command_that_changes_at_the_requeue_still_finds_its_run(experiment):
    zero, one, first, second = (
        start(experiment, name, step=step) for name, step in (("a", "0"), ("b", "1"), ("c", "batch"), ("d", "batch"))
    )
    assert start(experiment, "b", "--resume", restart=1, step="1") == one
    assert start(experiment, "a", "--resume", restart=1, step="0") == zero
    assert start(experiment, "c", "--resume", restart=1) == first
    assert start(experiment, "d", "--resume", restart=1) == second


def test_a_skipped_training_is_not_taken_for_the_next_one(experiment):
    done, at_work = start(experiment, "a"), start(experiment, "b")
    assert start(experiment, "b", restart=1) == at_work
    assert start(experiment, "c", restart=1) not in {done, at_work}


def test_a_run_that_was_removed_is_not_continued(experiment):
    first = start(experiment)
    claiming.remove_unused(experiment.run(first))
    assert start(experiment, restart=1) != first


def test_a_start_that_failed_gives_its_training_back(experiment):
    first = start(experiment)
    launch = SlurmLaunch(experiment, SlurmStart("7", 1, "batch"), ["train.py"])
    assert launch.run().run_id == first
    launch.give_back()
    assert start(experiment, restart=1) == first


def test_two_starts_that_see_the_same_training_do_not_both_take_it(experiment, monkeypatch):
    before = [start(experiment) for _ in range(2)]
    names = SlurmLaunch(experiment, SlurmStart("7", 1, "batch"))._names()
    monkeypatch.setattr(SlurmLaunch, "_names", lambda self: names)  # both looked before either claimed
    assert [start(experiment, restart=1) for _ in range(2)] == before


def test_a_record_that_cannot_be_read_is_passed_over(experiment):
    first = start(experiment)
    for number, content in enumerate(
        (b"", b"[]", b'{"run_id": 3, "restart": 0}', b'{"run_id": "x", "restart": "y"}'), 2
    ):
        (experiment.launches_path / f"slurm-7.{number}").write_bytes(content)
    assert start(experiment, restart=1) == first


def test_of_two_rivals_for_a_name_one_makes_the_run_and_the_other_hears_of_it(experiment):
    runs = [claiming.create_run(experiment, "token")[0] for _ in range(2)]
    rivals = [NamedLaunch(experiment, "id-x", 1) for _ in range(2)]
    assert [launch.run() for launch in rivals] == [None, None]
    assert [launch.remember(run) for launch, run in zip(rivals, runs, strict=True)] == [True, False]
    assert rivals[1].run() == runs[0]


@contextlib.contextmanager
def agent(error_file):
    """As a worker whose torchrun agent told it to write errors there."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
        yield


@pytest.mark.parametrize("content", [b"", b"torchrun-", b"torchrun-0123", b"id-x", b"../escape", b"\xff\xfe"])
def test_what_a_torn_write_left_with_the_agent_is_no_name(tmp_path, content):
    (tmp_path / "runmgr-launch").write_bytes(content)
    with agent(tmp_path / "attempt_0" / "0" / "error.json"):
        assert launches.remembered_by_agent() is None


def test_each_agent_remembers_its_launch_over_restarts_and_others_do_not(tmp_path):
    key = "torchrun-0123456789abcdef"
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    with agent(tmp_path / "one" / "attempt_0" / "0" / "error.json"):
        assert launches.remembered_by_agent() is None
        launches.remember_by_agent(key)
        launches.remember_by_agent("id-what the user said needs no help")
    with agent(tmp_path / "one" / "attempt_3" / "1" / "error.json"):
        assert launches.remembered_by_agent() == key
    for elsewhere in (tmp_path / "other" / "attempt_0" / "0" / "error.json", "", "error.json"):
        with agent(elsewhere):
            assert launches.remembered_by_agent() is None


def test_where_an_agent_cannot_remember_a_start_goes_on(tmp_path):
    with agent(tmp_path / "gone" / "attempt_0" / "0" / "error.json"):
        launches.remember_by_agent("torchrun-0123456789abcdef")
        assert launches.remembered_by_agent() is None
