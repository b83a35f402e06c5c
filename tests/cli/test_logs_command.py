"""`runmgr logs`, also of a run that is being trained by other processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from processes import clean_environment

import runmgr
from runmgr import cli

TRAINING = """
import os, sys, time, runmgr
with runmgr.start_run("live", resume=sys.argv[1]) as run:
    run.logger.info("first words of attempt %d", run.attempt)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.05)
    run.logger.info("last words of attempt %d", run.attempt)
    if sys.argv[3:] == ["fails"]:
        raise ZeroDivisionError
"""


@pytest.fixture
def run(root):
    """A run of two attempts, in which rank 3 logged something as well."""
    for epoch in (1, 2):
        with runmgr.start_run("two", resume="latest") as run:
            run.restore({"x": 1})
            run.logger.info("attempt %d speaks", run.attempt)
            run.save({"x": 1}, epoch=epoch)
    (run.run_dir / "log_20260101_000000_000000_rank3.txt").write_text("rank 3 speaks\nand again\n")
    return run


def test_the_logs_of_all_attempts_come_in_order(run, capsys):
    assert cli.main(["logs", "two"]) == 0
    out = capsys.readouterr().out
    assert 0 < out.index("attempt 1 speaks") < out.index("==> log_") < out.index("attempt 2 speaks")
    assert cli.main(["logs", "two", "--rank", "3", "-n", "1"]) == 0
    assert capsys.readouterr().out == "and again\n"
    assert cli.main(["logs", "two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(path) for path in runmgr.find_run("two").log_paths()]
    assert len(runmgr.find_run("two").log_paths()) == 2


def test_a_rank_without_a_log_is_an_error_that_names_those_with_one(run, capsys):
    assert cli.main(["logs", "two", "--rank", "1"]) == 1
    assert capsys.readouterr().err == f"runmgr: rank 1 of run {run.run_id} has no log; ranks with a log: 0, 3\n"


def _start(code, *arguments, tmp_path, root, out=subprocess.DEVNULL):
    return subprocess.Popen(
        [sys.executable, *code, *arguments], env=clean_environment(RUNMGR_CKPT_ROOT_DIR=str(root)), cwd=tmp_path,
        stdout=out, stderr=subprocess.STDOUT if out == subprocess.PIPE else subprocess.DEVNULL, text=True,
    )  # fmt: skip


def _until(found):
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_following_goes_on_over_attempts_and_ends_when_the_run_does(tmp_path, root):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    training = _start([str(script)], "never", "go1", "fails", tmp_path=tmp_path, root=root)
    _until(lambda: root.exists() and runmgr.list_runs("live") and runmgr.list_runs("live")[0].log_paths())
    following = _start(
        ["-m", "runmgr.cli"],
        "logs",
        "live@-1",
        "-f",
        "--wait",
        "60s",
        tmp_path=tmp_path,
        root=root,
        out=subprocess.PIPE,
    )
    lines = []
    try:
        while "first words of attempt 1" not in "".join(lines):
            lines.append(following.stdout.readline())
        (tmp_path / "go1").touch()
        assert training.wait(60) == 1
        (run,) = runmgr.list_runs("live")
        script.write_text(TRAINING.replace("resume=sys.argv[1]", f"run_id={run.run_id!r}"))
        training = _start([str(script)], "auto", "go2", tmp_path=tmp_path, root=root)
        while "first words of attempt 2" not in "".join(lines):
            assert following.poll() is None
            lines.append(following.stdout.readline())
        (tmp_path / "go2").touch()
        assert training.wait(60) == 0
        lines += following.stdout.readlines()
        assert following.wait(30) == 0
    finally:
        for process in (training, following):
            process.kill()
            process.wait()
        following.stdout.close()
    text = "".join(lines)
    told = [
        "first words of attempt 1",
        "last words of attempt 1",
        "==> log_",
        "first words of attempt 2",
        "last words of attempt 2",
    ]
    assert [text.count(words) for words in told] == [1] * 5
    assert sorted(told, key=text.index) == told
    assert lines[-1] == f"runmgr: run {run.run_id}: completed\n"


def test_following_a_run_that_failed_ends_after_the_wait(root, capsys):
    with pytest.raises(ZeroDivisionError), runmgr.start_run("bad"):
        raise ZeroDivisionError
    begun = time.monotonic()
    assert cli.main(["logs", "bad@-1", "-f", "--wait", "1s"]) == 0
    assert 1 <= time.monotonic() - begun < 20
    assert ": failed\n" in capsys.readouterr().err
