"""The faults of super-gradients' experiment management, one by one, shown not to be ours.

Each test names its fault by the number that docs/from-super-gradients.md has. Where another file proves it harder, the
docstring says which.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from children import Child
from processes import clean_environment, free_port, run, run_ranks, values
from torch import nn

import runmgr
from runmgr.disk import atomic, directory, integrity
from runmgr.errors import RankFailed
from runmgr.integrations import super_gradients as theirs
from runmgr.worker import writing


def net(path):
    return torch.load(path, weights_only=True)["net"]


def filled(value):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    return model


def test_sg_0_two_launches_of_one_microsecond_or_with_a_clock_set_back_get_different_ids(root, monkeypatch):
    """64 launches at once, with and without locks: tests/disk/test_launches_at_once.py."""
    moment = directory.now_us()
    monkeypatch.setattr(directory, "now_us", lambda: moment)
    rivals = [Child(lambda tell: tell(theirs.generate_run_id("digits"))) for _ in range(8)]
    found = [rival.read_rest() for rival in rivals]
    assert all(theirs.is_run_dir(root / "digits" / run_id) and (root / "digits" / run_id).is_dir() for run_id in found)
    assert len(set(found)) == 8
    for rival in rivals:
        rival.end()
    monkeypatch.setattr(directory, "now_us", lambda: moment - 3600 * 10**6)
    assert theirs.generate_run_id("digits") > max(found)


TWO_HOSTS = """
import os, sys
import torch.distributed as dist
import runmgr
from runmgr.integrations.super_gradients import execute_and_distribute_from_master, multi_process_safe

@multi_process_safe
def act():
    with open(sys.argv[1], "a") as file:
        file.write("acted ")

@execute_and_distribute_from_master
def decide():
    return os.getpid()

act()
before = decide()
with runmgr.start_run("digits") as run:
    dist.init_process_group("gloo")
    assert decide() == before, (decide(), before)
    run.save({"n": 1}, epoch=1)
    print(run.rank, os.environ["LOCAL_RANK"], run.run_id, before, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_sg_1_and_2_on_several_hosts_there_is_one_run_and_one_main_process(tmp_path, root):
    """Two torchrun agents, each with the local rank 0. With hosts and networks of their own: tests/cluster."""
    script, acted = tmp_path / "train.py", tmp_path / "acted"
    script.write_text(TWO_HOSTS)
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    agents = [
        subprocess.Popen(
            [*command, f"--node-rank={number}", str(script), str(acted)],
            env=clean_environment(RUNMGR_CKPT_ROOT_DIR=str(root)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=250) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], said
    ranks, local_ranks, run_ids, pids = zip(*(out.split() for out, _ in said), strict=True)
    assert (sorted(ranks), local_ranks) == (["0", "1"], ("0", "0"))
    assert acted.read_text() == "acted "
    assert len(set(pids)) == 1
    assert set(run_ids) == {path.name for path in root.glob("digits/RUN_*")}


@pytest.mark.parametrize("store", ["agent", "group"])
def test_sg_3_an_error_of_rank_0_reaches_all_at_once(store):
    @theirs.execute_and_distribute_from_master
    def fail():
        raise OSError("no space")

    outcomes = run_ranks(3, lambda _: fail(), store=store)
    assert {(type(outcome.error), outcome.error.error) for outcome in outcomes} == {(RankFailed, "no space")}
    assert max(outcome.seconds for outcome in outcomes) < 10


def test_sg_4_all_ranks_continue_the_run_that_rank_0_found(root):
    with runmgr.start_run("digits") as run:
        run.save({"n": 1}, epoch=1)

    def resume(rank):
        if rank == 1:  # whose client still has the listing of before
            os.listdir = lambda _path: []
            assert theirs.get_latest_run_id("digits") is None
        with runmgr.start_run("digits", **theirs.start_options({"resume": True, "metric_to_watch": None})) as resumed:
            return resumed.run_id, resumed.restore({"n": 0}).epoch

    assert values(run_ranks(2, resume)) == [(run.run_id, 1)] * 2


@pytest.mark.long
def test_sg_5_launches_share_no_file_outside_of_their_runs(tmp_path, root, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    script = work / "train.py"
    script.write_text(
        "import sys, runmgr\n"
        "from runmgr.integrations.super_gradients import BaseSGLogger\n"
        "with runmgr.start_run('digits', config={'lr': sys.argv[1]}) as run:\n"
        "    print('on the console')\n"
        "    BaseSGLogger(run).add_scalars({'loss': float(sys.argv[1])}, 1)\n"
    )
    monkeypatch.chdir(work)
    for lr in ("1", "2"):
        done = run(sys.executable, str(script), lr, HOME=str(home), RUNMGR_CKPT_ROOT_DIR=str(root))
        assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
    assert [path.name for path in work.iterdir()] == ["train.py"]
    assert sorted((path / "config.json").read_text().split('"')[3] for path in root.glob("digits/RUN_*")) == ["1", "2"]


def test_sg_6_only_rank_0_writes_what_is_averaged(root):
    """Eight real torchrun ranks under strace: tests/test_one_writer.py."""

    def train(rank):
        if rank:
            atomic.new_file = writing.write_file = None  # whoever calls it fails
        with runmgr.start_run("digits") as run:
            model = filled(1)
            averaging = theirs.ModelWeightAveraging(run.run_dir, True, "acc", model=model)
            averaging.get_average_model(model, {"acc": 0.5})
            run.save({"net": model, "average": averaging.average}, epoch=1)
            run.save_average(averaging.average)

    values(run_ranks(3, train, store="group"))
    (info,) = runmgr.list_runs("digits")
    names = {path.name for path in info.path.iterdir()}
    assert {"average_model.pth", "ckpt_latest.pth"} <= names
    assert not {name for name in names if "snapshot" in name}


@pytest.mark.parametrize("writes", ["a checkpoint", "a file beside"])
def test_sg_7_a_kill_in_the_middle_of_writing_leaves_what_was_there(root, writes):
    """At each system call of a save: tests/worker/test_every_call.py; through a power cut: tests/disk/test_power.py."""

    def train(tell):
        with runmgr.start_run("digits") as run:
            logger = theirs.BaseSGLogger(run)
            run.save({"net": filled(1)}, epoch=1)
            logger.add_checkpoint("extra", {"net": filled(1).state_dict()})
            tell(run.run_id)
            true, written = integrity.RecordStream.write, 0

            def write(stream, content):
                nonlocal written
                written += len(content)
                done = true(stream, content)
                if written > 500:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            integrity.RecordStream.write = write
            if writes == "a checkpoint":
                run.save({"net": filled(2)}, epoch=2)
            logger.add_checkpoint("extra", {"net": filled(2).state_dict()})
            tell("not killed")

    child = Child(train)
    run_id = child.read_rest()
    child.end()
    path = root / "digits" / run_id
    assert net(path / "ckpt_latest.pth")["weight"].item() == 1
    assert net(path / "extra.pth")["weight"].item() == 1
    assert theirs.get_latest_run_id("digits") == run_id
    model = filled(0)
    with runmgr.start_run("digits", run_id=run_id) as run:
        assert run.restore({"net": model}).epoch == 1
    assert model.weight.item() == 1


def test_sg_8_an_epoch_that_is_latest_best_listed_and_averaged_is_written_once():
    model = nn.Linear(512, 512)
    options = theirs.start_options({"metric_to_watch": "acc", "save_ckpt_epoch_list": [1, 2]})
    with runmgr.start_run("digits", **options) as run:
        averaging = theirs.ModelWeightAveraging(run.run_dir, True, "acc", model=model)
        size_bytes, before = sum(tensor.nbytes for tensor in model.state_dict().values()), _written_bytes()
        for epoch in (1, 2):
            averaging.update_snapshots_dict(model, {"acc": epoch})
            run.save({"net": model, "average": averaging.average}, epoch=epoch, metrics={"acc": epoch})
        assert _written_bytes() - before < 2.2 * size_bytes
        names = ("ckpt_latest.pth", "ckpt_best.pth", "ckpt_epoch_2.pth")
        assert len({(run.run_dir / name).stat().st_ino for name in names}) == 1


def _written_bytes() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])


def test_sg_9_a_file_that_is_replaced_is_at_no_moment_missing(tmp_path):
    """Nothing is uploaded; what backs a run up may copy it at any moment."""
    source = tmp_path / "recipe.yaml"
    with runmgr.start_run("digits") as run:
        logger = theirs.BaseSGLogger(run)
        source.write_text("0" * 1000)
        logger.add_file(source)
        logger.add_checkpoint("extra", {"n": 0})
        ended, problems = threading.Event(), []

        def watch():
            while not ended.is_set():
                try:
                    content = (run.run_dir / "recipe.yaml").read_text()
                    assert len(content) == 1000
                    assert "n" in torch.load(run.path("extra.pth"), weights_only=True)
                except (OSError, AssertionError, RuntimeError, EOFError) as error:
                    problems.append(error)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(20):
            source.write_text(str(number % 10) * 1000)
            logger.add_file(source)
            logger.add_checkpoint("extra", {"n": number})
        ended.set()
        watcher.join()
    assert problems == []


@pytest.mark.parametrize(
    ("greater_is_better", "best", "worse", "better"), [(True, 0.9, 0.5, 0.95), (False, 0.1, 0.5, 0.05)]
)
def test_sg_10_the_best_is_known_after_a_resume(greater_is_better, best, worse, better):
    params = {"resume": True, "metric_to_watch": "m", "greater_metric_to_watch_is_better": greater_is_better}
    found = []
    for epoch, value in enumerate((best, worse, better), 1):
        with runmgr.start_run("digits", **theirs.start_options(params)) as run:
            run.restore({"net": filled(0)})
            run.save({"net": filled(epoch)}, epoch=epoch, metrics={"m": value})
            found.append(int(net(run.path("best"))["weight"].item()))
    assert run.attempt == 3
    assert found == [1, 1, 3]


def test_sg_11_validating_the_average_after_a_resume_leaves_the_weights_in_latest():
    def state():
        model = filled(1)
        ema = theirs.ModelEMA.from_params(model, "constant", 0.5)
        return model, ema, {"net": model, "ema_net": ema.average}

    model, ema, saved = state()
    with runmgr.start_run("digits") as run:
        nn.init.constant_(model.weight, 3)
        ema.update(model, 1, 2)
        run.save(saved, epoch=1)
    model, ema, saved = state()
    with runmgr.start_run("digits", resume="latest") as run:
        run.restore(saved)
        with ema.average.applied():
            assert model.weight.item() == 2
        assert model.weight.item() == 3
        run.save(saved, epoch=2)
    assert net(run.path("latest"))["weight"].item() == 3
    assert ema.average.averaged_state_dict()["weight"].item() == 2


def test_sg_12_scalars_without_a_step_are_written():
    with runmgr.start_run("digits") as run:
        theirs.BaseSGLogger(run).add_scalars({"Loss": 1.0})
    assert "Loss: 1" in next(run.run_dir.glob("log_*.txt")).read_text()


def test_sg_13_the_checkpoint_and_the_run_that_are_named_are_the_ones_that_are_read():
    runs = []
    for value in (1, 2):
        with runmgr.start_run("digits", **theirs.start_options({"metric_to_watch": "acc"})) as run:
            run.save({"net": filled(value)}, epoch=1, metrics={"acc": 1})
            run.save({"net": filled(10 * value)}, epoch=2, metrics={"acc": 0})
        runs.append(run)
    for run, value in zip(runs, (1, 2), strict=True):
        for name, expected in (("ckpt_best.pth", value), ("ckpt_latest.pth", 10 * value)):
            model = filled(0)
            theirs.load_checkpoint_to_model(model, theirs.get_ckpt_local_path("digits", name, run_id=run.run_id))
            assert model.weight.item() == expected
    with pytest.raises(runmgr.CheckpointNotFound), runmgr.start_run("digits", run_id=run.run_id, monitor="acc") as run:
        run.restore({"net": filled(0)}, "average")


def test_sg_14_a_checkpoint_from_elsewhere_is_gone_on_with_at_the_first_start(tmp_path):
    downloaded = tmp_path / "ckpt_epoch_7.pth"
    torch.save({"net": filled(7).state_dict(), "epoch": 7}, downloaded)
    model = filled(0)
    with runmgr.start_run("digits", **theirs.start_options({"resume_path": downloaded})) as run:
        assert run.restore({"net": model}).epoch == 7
        assert run.attempt == 1
    assert model.weight.item() == 7


def test_sg_15_best_holds_what_is_in_the_state_such_as_the_student_alone():
    student, teacher = filled(1), filled(2)
    distilled = nn.ModuleDict({"student": student, "teacher": teacher})
    with runmgr.start_run("digits", monitor="acc") as run:
        run.save({"net": distilled["student"]}, epoch=1, metrics={"acc": 1})
    assert set(net(run.path("best"))) == {"weight", "bias"}
    assert net(run.path("best"))["weight"].item() == 1
