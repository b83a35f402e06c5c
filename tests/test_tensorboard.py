"""What a person sees in TensorBoard: one clean curve and one row for each run, whatever happened to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import clean_environment, descendants, run, run_ranks, values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboards import LIMIT_S, assert_nothing_left, served
from torch import nn

import runmgr

CONFIG = {"lr": 0.1, "model": {"name": "tiny", "layers": [4, 4]}, "amp": False, "warmup": None, "api_key": "sk-123"}


def _train(rank, root, last, die_after=None, units=("epoch", "step")):
    """Log each step, save every few; die without a word after a step that was not saved."""
    model = nn.Linear(2, 2)
    with runmgr.start_run("killed", ckpt_root_dir=root, config=CONFIG, monitor="val") as run:
        progress = run.restore({"net": model})
        for step in range((progress.step or progress.epoch) + 1, last + 1):
            run.log_scalars({"loss": step}, step=step)
            run.tensorboard.flush()
            if step % 5 == 0:
                run.log_scalars({"val": step}, step=step)
                where = dict.fromkeys(units, step)
                run.save({"net": model}, **where, metrics={"val": step})
            if step == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
    return run.attempt


def _kill_and_resume(root, *deaths, last=30, units=("epoch", "step")):
    one_launch = {"RUNMGR_LAUNCH_ID": "one"}
    for step in deaths:
        (outcome,) = run_ranks(1, _train, root, last, step, units, environ=one_launch)
        assert outcome.signal == signal.SIGKILL
    assert values(run_ranks(1, _train, root, last, None, units, environ=one_launch)) == [len(deaths) + 1]
    (info,) = runmgr.list_runs("killed", root)
    assert info.status == "completed"
    assert len(list(info.path.glob("events.out.tfevents.*"))) == len(deaths) + 1
    return info.path


@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_a_run_killed_and_resumed_twice_is_one_clean_curve_and_one_row(root, load_fast):
    _kill_and_resume(root, 14, 23)
    with served(root, "killed", "--", f"--load_fast={load_fast}") as board:
        (name,) = board.wait_for_runs(1)
        assert [name] == board.names
        ended = board.until(board.rows, lambda rows: rows and rows[0]["sessions"][0]["status"] == "STATUS_SUCCESS")
        assert board.scalars(name, "loss") == [(step, step) for step in range(1, 31)]
        assert board.scalars(name, "val") == [(step, step) for step in range(5, 31, 5)]
        assert [step for step, _ in board.texts(name, "command")] == [0, 10, 20], (
            "a text for each attempt, where it began"
        )
        assert "attempt: 3" in board.texts(name, "command")[-1][1]
    (row,) = ended
    assert row["name"] == name
    assert len(row["sessions"]) == 1
    assert row["hparams"] == {
        "lr": 0.1, "model.name": "tiny", "model.layers": "[4, 4]", "amp": False, "warmup": "None", "api_key": "********",
    }  # fmt: skip
    assert {value["name"]["tag"]: value["value"] for value in row["metricValues"]} == {"loss": 30, "val": 30}


@pytest.mark.parametrize(
    ("deaths", "units"),
    [((3, 4), ("epoch", "step")), ((14, 18), ("epoch",)), ((7, 12, 18, 18), ("step",))],
    ids=["before the first save", "counting epochs alone", "without progress between two kills"],
)
def test_each_step_is_shown_once(root, deaths, units):
    path = _kill_and_resume(root, *deaths, last=20, units=units)
    events = EventAccumulator(str(path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 21))


def test_a_fork_begins_with_curves_of_its_own(root):
    parent = _kill_and_resume(root, last=5)
    options = {"fork_from": parent.name}
    for attempt in (1, 2):
        with runmgr.start_run("killed", ckpt_root_dir=root, **options) as fork:
            options = {"run_id": fork.run_id}
            fork.restore({"net": nn.Linear(2, 2)})
            fork.log_scalars({"loss": 1, "early": attempt}, step=3)
    events = EventAccumulator(str(fork.run_dir)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("early")] == [(3, 2)]


def test_a_checkpoint_knows_how_far_the_events_had_come_whichever_way_they_were_written(root):
    for attempt, (steps, known) in enumerate((((), -1), ((3, 2), 3), ((), 3), ((7,), 7)), start=1):
        with runmgr.start_run("known", resume="latest") as run:
            if attempt == 4:
                run.tensorboard.add_text("note", "before the restore", 0)
            run.restore({"x": torch.ones(1)})
            for step in steps:
                run.tensorboard.add_histogram("weights", torch.ones(4), step)
            assert run.save({"x": torch.ones(1)}, epoch=attempt).checkpoint.logged == known


def test_a_clock_that_runs_behind_keeps_the_order_of_attempts(root, caplog):
    with runmgr.start_run("clock") as run:
        run.log_scalars({"loss": 1}, step=1)
        run.save({"x": torch.ones(1)}, step=1)
    for ahead_s, is_told in ((2, False), (3600, True)):
        future = run.run_dir / f"events.out.tfevents.{int(time.time()) + ahead_s}.other.1.0"
        future.touch()
        with runmgr.start_run("clock", run_id=run.run_id) as again:
            again.restore({"x": torch.ones(1)})
            again.log_scalars({"loss": 1}, step=2)
        newest = max(path.name for path in run.run_dir.glob("events.*"))
        assert (newest == future.name) is is_told
        assert ("clock is 36" in caplog.text) is is_told
        future.unlink()


def test_what_ended_badly_is_not_called_a_success_and_one_without_scalars_has_no_events(root):
    with pytest.raises(ZeroDivisionError), runmgr.start_run("bad") as bad:  # noqa: PT012  # a training that fails
        bad.log_scalars({"loss": 1}, step=1)
        raise ZeroDivisionError
    with runmgr.start_run("bad") as silent:
        silent.save({"x": torch.ones(1)}, step=1)
    assert not list(silent.run_dir.glob("events.*")), "and no half second for an import"
    events = EventAccumulator(str(bad.run_dir)).Reload()
    assert set(events.summary_metadata) == {
        "_hparams_/session_start_info", "command/text_summary", "config/text_summary",
    } | ({"git/text_summary"} if bad._writer.record.content["git"] else set())  # fmt: skip


def _log(experiment, **config):
    with runmgr.start_run(experiment, resume="never", config=config) as run:
        run.log_scalars({"loss": 1}, step=1)
    return run


def test_runs_that_begin_later_appear_and_removed_ones_are_let_go(root):
    (root / "wörter 🎉").mkdir(parents=True)
    with served(root, "wörter 🎉", "--", "--reload_interval=1") as board:
        assert board.names == []
        first, second = _log("wörter 🎉", lr=1e-3), _log("wörter 🎉", lr=3e-3, data="a/b")
        names = board.wait_for_runs(2)
        assert [name.partition(" ")[2] for name in names] == ["lr=0.001", "lr=0.003 data=a_b"]
        assert [row["hparams"]["lr"] for row in board.rows()] == [1e-3, 3e-3]
        first.run_dir.rename(root / "gone")
        assert board.wait_for_runs(1) == names[1:]
        assert second.run_dir.exists()


def test_everything_under_a_root_that_cannot_be_written_to(root, tmp_path):
    _log("digits")
    _log("letters")
    before = sorted(root.rglob("*"))
    for path in (root, *root.iterdir()):
        path.chmod(0o500)
    with served(root) as board:
        assert [name.partition("/")[0] for name in board.wait_for_runs(2)] == ["digits", "letters"]
    assert sorted(root.rglob("*")) == before
    for path in (root, *root.iterdir()):
        path.chmod(0o700)


def test_a_person_reads_where_it_is_and_a_kill_leaves_nothing(root, tmp_path):
    _log("digits")
    command = [sys.executable, "-m", "runmgr.cli", "tensorboard", "digits/", "RUN_20200101_000000_000000"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has a run RUN_20200101_000000_000000" in done.stderr
    environ = clean_environment(TMPDIR=str(tmp_path))
    with subprocess.Popen(command[:-1], env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("TensorBoard shows 1 run of digits/: http://localhost:")
        assert line.endswith("/ (Ctrl-C ends it)\n")
        processes = descendants(process.pid)
        process.kill()
        process.wait(LIMIT_S)
        assert_nothing_left(processes, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--", "--no_such_option"), "unrecognized arguments: --no_such_option"), (("--port=1234567",), "port")],
)
def test_what_tensorboard_itself_refuses_is_one_line(root, options, said):
    root.mkdir()
    done = run(sys.executable, "-m", "runmgr.cli", "tensorboard", *options, RUNMGR_CKPT_ROOT_DIR=str(root))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("runmgr: TensorBoard did not start: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
