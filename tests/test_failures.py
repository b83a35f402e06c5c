"""When a rank dies, its last words lie in the run, and those that were only torn down are not blamed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from processes import TORCHRUN_RANKS as RANKS
from processes import run, run_ranks, torchrun, values

import runmgr
from runmgr import cli
from runmgr.disk import failures
from runmgr.disk.directory import RunDirectory
from runmgr.errors import AgreementError, InvalidInput, RankFailed, RankTimeout, Superseded, echo
from runmgr.worker import failure

if TYPE_CHECKING:
    from pathlib import Path


def _only_run(root) -> Path:
    (path,) = root.glob("*/RUN_*")
    return path


def _reports(run_dir) -> dict[str, dict]:
    folder = run_dir / ".runmgr" / "failures"
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _shown(root, capsys) -> dict:
    capsys.readouterr()
    assert cli.main(["show", str(_only_run(root)), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["first_failure"]


def test_an_exception_leaves_traceback_log_host_and_place_but_no_variables(root):
    password = "hunter2"  # what the frames hold is nobody's business
    with pytest.raises(ZeroDivisionError), runmgr.start_run("x") as run:  # noqa: PT012
        for step in range(60):
            run.logger.info("step %d", step)
        run.logger.debug("below the level")
        raise ZeroDivisionError("nothing to divide")
    reports = _reports(run.run_dir)
    assert list(reports) == ["0001-00000-cause.json"]
    (report,) = reports.values()
    assert report["traceback"][-1] == "ZeroDivisionError: nothing to divide"
    assert any("test_failures.py" in line for line in report["traceback"])
    assert password not in "".join(line for line in report["traceback"] if "password =" not in line)
    assert (len(report["log"]), report["log"][-1].endswith("step 59")) == (50, True)
    assert report["pid"] == os.getpid()
    assert (report["attempt"], report["rank"], report["local_rank"], report["is_consequence"]) == (1, 0, 0, False)
    assert report["clock_offset_s"] == 0.0
    assert report["device_memory"] is None
    assert not torch.cuda.is_initialized()
    found = runmgr.get_run("x", run.run_id).record["first_failure"]
    assert (found["rank"], found["error"]) == (0, "ZeroDivisionError: nothing to divide")
    assert (run.run_dir / found["report"]).is_file()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), SystemExit(0), SystemExit()], ids=repr)
def test_a_good_end_and_an_interrupt_leave_no_report(root, error):
    with nullcontext() if error is None else pytest.raises(type(error)), runmgr.start_run("x") as run:
        if error is not None:
            raise error
    assert _reports(run.run_dir) == {}
    assert not (run.run_dir / ".runmgr" / "failures").exists()


def test_without_with_the_exit_of_the_interpreter_leaves_the_report(tmp_path, root):
    script = tmp_path / "script.py"
    script.write_text("import runmgr\nrunmgr.start_run('x')\nraise ValueError('unlucky')\n")
    assert run(sys.executable, str(script), RUNMGR_CKPT_ROOT_DIR=str(root)).returncode == 1
    (report,) = _reports(_only_run(root)).values()
    assert report["error"] == {"type": "ValueError", "message": "unlucky"}


def test_a_report_that_cannot_be_written_never_hides_the_error(root, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failures, "leave", refuse)
    with pytest.raises(ZeroDivisionError), runmgr.start_run("x") as run:
        raise ZeroDivisionError
    assert runmgr.get_run("x", run.run_id).status == "failed"
    (log,) = run.run_dir.glob("log_*.txt")
    assert "rank 0 could not be reported: [Errno 28] No space left on device" in log.read_text()


class _Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def test_an_error_that_cannot_be_printed_is_reported_all_the_same(root):
    with pytest.raises(_Unprintable), runmgr.start_run("x") as run:
        raise _Unprintable
    (report,) = _reports(run.run_dir).values()
    assert report["error"] == {"type": "_Unprintable", "message": "<_Unprintable that cannot be shown>"}
    assert runmgr.get_run("x", run.run_id).status == "failed"


def _chained(error, *, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    error.__suppress_context__ = cause is not None
    return error


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "is_consequence"),
    [
        (ValueError("bad batch"), False),
        (ConnectionResetError("the data server went away"), False),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError(GLOO), True),
        (dist.DistBackendError("NCCL error: unhandled system error"), True),
        (dist.DistNetworkError("the server is gone"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), False),
        (RankFailed("", rank=5, host="a", what="", error_type="", error=""), True),
        (RankFailed("", rank=3, host="a", what="", error_type="", error=""), False),
        (RankTimeout("", ranks=[5], what="", timeout_s=1), True),
        (RankTimeout("", ranks=[3, 5], what="", timeout_s=1), False),
        (AgreementError("lost the store"), True),
        (Superseded("", run_id="", attempt=1, newer=2), True),
        (InvalidInput("epoch=-1"), False),
        (echo("InvalidInput", "epoch=-1", {}), True),
        (_chained(echo("InvalidInput", "epoch=-1", {}), cause=InvalidInput("epoch=-1")), False),
        (SystemExit(143), True),
        (SystemExit(1), False),
        (_chained(KeyError("step failed"), cause=RuntimeError(GLOO)), True),
        (_chained(RuntimeError(GLOO), context=ValueError("bad batch")), False),
        (_chained(RuntimeError(GLOO), context=StopIteration()), True),
    ],
)
def test_consequences_are_told_from_causes(error, is_consequence):
    assert (failure.reason(error, 3) is not None) is is_consequence
    assert failure.reason(error, 3, "SIGTERM") == "it came after SIGTERM"


def test_the_error_that_cleaning_up_hid_is_the_one_that_is_named(root):
    with pytest.raises(RuntimeError, match="gloo"), runmgr.start_run("x") as run:  # noqa: PT012
        try:
            raise ValueError("bad batch")
        finally:
            raise RuntimeError(GLOO)
    (report,) = _reports(run.run_dir).values()
    assert (report["error"]["message"], report["is_consequence"]) == ("bad batch", False)


def _fail_in_save(rank, root):
    class Broken:
        def state_dict(self):
            if rank == 2:
                raise ValueError("no state today")
            return {}

    with runmgr.start_run("x", ckpt_root_dir=root) as run:
        run.save({"broken": Broken()}, epoch=1)


def test_a_failure_inside_a_collective_call_blames_the_rank_that_had_it(root, capsys):
    outcomes = run_ranks(4, _fail_in_save, root)
    assert {type(outcome.error) for outcome in outcomes} == {RankFailed}
    reports = _reports(_only_run(root))
    assert sorted(reports) == [f"0001-0000{rank}-{'cause' if rank == 2 else 'consequence'}.json" for rank in range(4)]
    assert any("ValueError: no state today" in line for line in reports["0001-00002-cause.json"]["traceback"])
    assert any("in state_dict" in line for line in reports["0001-00002-cause.json"]["traceback"])
    found = _shown(root, capsys)
    assert (found["rank"], found["why"]) == (2, "the only rank with a cause of its own; 3 more ended because of others")
    recorded = json.loads((_only_run(root) / "run.json").read_text())["first_failure"]
    assert recorded | {"why": found["why"]} == found, "but for those that ended after rank 0"


def _die_between_collectives(rank, root):
    with runmgr.start_run("x", ckpt_root_dir=root):
        for step in range(20):
            if rank == 2 and step == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1))


def test_a_rank_killed_by_sigkill_is_named_by_its_neighbours(root, capsys):
    outcomes = run_ranks(3, _die_between_collectives, root, store="group")
    assert [outcome.signal for outcome in outcomes] == [None, None, signal.SIGKILL]
    found = _shown(root, capsys)
    assert (found["rank"], found["error"]) == (2, "killed by SIGKILL")
    assert found["why"].startswith("the only rank with a cause of its own; 2 more ended")
    recorded = json.loads((_only_run(root) / "run.json").read_text())["first_failure"]
    assert recorded | {"why": found["why"]} == found, "but for those that ended after rank 0"
    reports = _reports(_only_run(root))
    assert all(reports[f"0001-0000{rank}-consequence.json"]["is_consequence"] for rank in (0, 1))
    assert reports["0001-00002-cause.json"]["seen_by"] in {0, 1}


def _end_early(rank, root):
    with runmgr.start_run("x", ckpt_root_dir=root) as run:
        if rank == 1:
            run.finish()
            return
        time.sleep(0.3)


def test_a_rank_that_ended_well_before_the_others_leaves_nothing(root):
    values(run_ranks(3, _end_early, root))
    assert _reports(_only_run(root)) == {}


def _killed(rank, root):
    with runmgr.start_run("x", ckpt_root_dir=root, run_id=None) as run:
        run.save({"n": 1}, epoch=1)
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_start_says_that_nobody_could_speak(root, capsys):
    run_ranks(1, _killed, root)
    assert _shown(root, capsys)["error"] == "the attempt did not end, and no rank left a report"
    with runmgr.start_run("x", resume="latest") as run:
        run.restore({"n": 0})
    found = runmgr.get_run("x", run.run_id).record["first_failure"]
    assert (found["attempt"], found["rank"]) == (1, None)
    (_, log) = sorted(run.run_dir.glob("log_*.txt"))
    assert "first failure of attempt 1: the attempt did not end, and no rank left a report" in log.read_text()


def _leave(run, rank, at, *, kind="cause", offset=0.0, **more):
    report = {
        "attempt": 1, "rank": rank, "host": f"host{rank}", "time": f"2026-01-01T00:00:{at:02d}+00:00",
        "is_consequence": kind == "consequence", "error": {"type": "ValueError", "message": str(rank)},
    } | more  # fmt: skip
    path = failures.leave(run, report)
    content = json.loads(path.read_text()) | {"clock_offset_s": offset}
    path.write_text(json.dumps(content))


ATTEMPT = {"attempt": 1, "hosts": [{"host": "a", "ranks": [0, 1]}, {"host": "b", "ranks": [2, 3]}]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ".runmgr").mkdir()
    return RunDirectory(tmp_path)


def test_among_causes_the_earliest_by_the_file_servers_clock_counts_and_a_consequence_never(folder):
    _leave(folder, 0, 1, kind="consequence")
    _leave(folder, 1, 10)
    _leave(folder, 2, 40, offset=-35.0)
    found = failures.first(folder, ATTEMPT)
    assert (found["rank"], found["host"]) == (2, "host2")
    assert found["why"] == (
        "the earliest of 2 causes, each host's clock set right by the file server's; the others: rank 1; "
        "1 more ended because of others"
    )


def test_without_a_cause_the_rank_that_consequences_point_at_is_named(folder):
    _leave(folder, 0, 2, kind="consequence")
    _leave(folder, 1, 1, kind="consequence")
    found = failures.first(folder, ATTEMPT)
    assert (found["rank"], found["error"]) == (None, "ValueError: 1")
    assert found["why"].endswith("Nothing was left by ranks 2, 3: killed, or ended with the others")
    _leave(folder, 2, 3, kind="consequence")
    found = failures.first(folder, ATTEMPT)
    assert (found["rank"], found["host"]) == (3, "b")
    assert "this one alone left nothing" in found["why"]


@pytest.mark.parametrize("hint", [{"blames": [3]}, {"gone": {"3": None}}])
def test_a_rank_waited_for_in_vain_or_seen_gone_is_named(folder, hint):
    _leave(folder, 0, 1, kind="consequence", **hint)
    found = failures.first(folder, ATTEMPT)
    assert (found["rank"], found["host"]) == (3, "b")
    assert found["why"].startswith("no rank left a cause; rank 0 ")


def test_a_report_is_written_once_and_a_damaged_one_hides_no_other(folder):
    _leave(folder, 1, 5)
    assert failures.leave(folder, {"attempt": 1, "rank": 1, "is_consequence": True}) is None
    (folder.failures_path / "0001-00003-cause.json").write_text("{")
    assert failures.first(folder, ATTEMPT)["rank"] == 1
    assert not list(folder.failures_path.glob("*.tmp-*"))


LAST = RANKS - 1
TRAINING = f"""
import os, signal
import torch, torch.distributed as dist
import runmgr

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    dist.init_process_group("gloo")
with runmgr.start_run("x") as run:
    for step in range(1, 1000):
        if run.rank == {LAST} and step == 100:
            if run.attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("bad batch at step 100")
        dist.all_reduce(torch.ones(1)) if run.attempt == 1 else run.wait()
"""


@pytest.mark.long
@pytest.mark.timeout(480)
def test_the_last_rank_of_a_real_torchrun_is_named_killed_or_with_its_traceback(tmp_path, root, capsys):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    done = torchrun(str(script), ranks=RANKS, options=("--max-restarts=1",), timeout_s=450)
    assert done.returncode != 0
    path, error = _only_run(root), "ValueError: bad batch at step 100"
    causes = [name for name in _reports(path) if name.endswith("-cause.json")]
    assert causes == [f"000{attempt}-0000{LAST}-cause.json" for attempt in (1, 2)]
    (_, log) = sorted(path.glob("log_*[0-9].txt"))
    assert re.search(rf"first failure of attempt 1: rank {LAST} on \S+: killed by SIGKILL\n", log.read_text())
    found = _shown(root, capsys)
    assert (found["rank"], found["error"], found["attempt"]) == (LAST, error, 2)
    assert cli.main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^first failure  rank {LAST} on \S+: {error} \(attempt 2\)$", shown, flags=re.MULTILINE)
    assert f"traceback      {path / found['report']}\n" in shown
    report = json.loads((path / found["report"]).read_text())
    assert report["traceback"][-1] == error
    assert any('train.py", line' in line for line in report["traceback"])
    with runmgr.start_run("x", run_id=path.name) as run:
        pass
    assert not list(path.rglob("*.tmp-*"))  # what SIGTERM cut off
    assert runmgr.get_run("x", run.run_id).record["first_failure"] == found
