"""start_run: one launch, one run, whatever started it; and one clear error on every rank where that cannot be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import clean_environment, run, run_ranks, torchrun, values
from worker.faults import fill, read_only, small_disk

import runmgr
from runmgr import opening, start
from runmgr.disk import claiming
from runmgr.errors import (
    AgreementError,
    InvalidInput,
    InvalidName,
    NotShared,
    RankFailed,
    RankTimeout,
    RunError,
    RunNotFound,
)
from runmgr.worker import agreement

HOST = socket.gethostname()


def open_and_report(_rank, **options):
    with runmgr.start_run("x", **options) as run:
        return run.run_id, run.rank, run.world_size, run.attempt


def runs(root: Path) -> list[Path]:
    return sorted(root.glob("x/RUN_*"))


def the_one_error(outcomes, *, within_s=10.0):
    assert all(outcome.signal is None for outcome in outcomes), outcomes
    faces = {(type(outcome.error), str(outcome.error)) for outcome in outcomes}
    assert len(faces) == 1, faces
    assert outcomes[0].error is not None, "nobody raised"
    assert max(outcome.seconds for outcome in outcomes) < within_s
    return outcomes[0].error


# ---------------------------------------------------------------------------------------------- who may start a run


def test_alone(root):
    with runmgr.start_run("x", config={"lr": 1}, tags=["a", "b"]) as run:
        assert (run.rank, run.world_size, run.is_main, run.attempt, run.resumed) == (0, 1, True, 1, False)
        assert run.config == {"lr": 1}
        assert run.run_dir == root / "x" / run.run_id
        record = json.loads((run.run_dir / "run.json").read_text())
        assert (record["status"], record["tags"], record["world_size"]) == ("running", ["a", "b"], 1)
        assert json.loads((run.run_dir / "config.json").read_text()) == {"lr": 1}
    assert json.loads((run.run_dir / "run.json").read_text())["status"] == "completed"
    assert [info.run_id for info in runmgr.list_runs("x")] == [run.run_id]


@pytest.mark.parametrize("store", ["agent", "group"])
def test_all_ranks_of_a_launch_get_one_directory(store, root):
    found = values(run_ranks(8, open_and_report, store=store))
    (run_id,) = {run_id for run_id, *_ in found}
    assert [place for _, *place in found] == [[rank, 8, 1] for rank in range(8)]
    assert [path.name for path in runs(root)] == [run_id]
    assert (
        json.loads((root / "x" / run_id / "run.json").read_text())["hosts"]
        == [{"host": HOST, "ranks": list(range(8)), "devices": []}]
        or Path("/proc/driver/nvidia").exists()
    )


TORCHRUN_SCRIPT = """
import json, logging, os, sys, time
import torch, torch.distributed as dist
import runmgr

def report(run):
    with open(f"{os.environ['OUT']}/{run.experiment_name}.{run.rank}.{run.attempt}", "w") as file:
        json.dump([run.run_id, run.rank, run.world_size, run.attempt, run.resumed], file)
"""


def under_torchrun(tmp_path, body, **options):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN_SCRIPT + textwrap.dedent(body))
    (tmp_path / "out").mkdir()
    done = torchrun(str(script), OUT=str(tmp_path / "out"), **options)
    reports = {path.name: json.loads(path.read_text()) for path in sorted((tmp_path / "out").iterdir())}
    return done, reports


def test_under_torchrun_before_and_after_init_process_group_and_twice_in_a_script(tmp_path, root):
    done, reports = under_torchrun(
        tmp_path,
        """
        with runmgr.start_run("before") as run:
            report(run)
            dist.init_process_group("gloo")
        with runmgr.start_run("after") as run:
            report(run)
        dist.destroy_process_group()
        with runmgr.start_run("later") as run:
            report(run)
        assert not torch.cuda.is_initialized()
        """,
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    for name in ("before", "after", "later"):
        (path,) = (root / name).glob("RUN_*")
        assert [reports[f"{name}.{rank}.1"] for rank in (0, 1)] == [[path.name, rank, 2, 1, False] for rank in (0, 1)]


@pytest.mark.long
def test_a_torchrun_restart_continues_the_run_and_never_hears_the_old_answers(tmp_path, root):
    done, reports = under_torchrun(
        tmp_path,
        """
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if restarts == 1 and os.environ["RANK"] == "0":
            time.sleep(2)
        first = runmgr.start_run("x")
        report(first)
        first.save({"n": restarts} if not first.resumed else (first.restore({"n": 0}), {"n": restarts})[1], epoch=restarts + 1)
        first.finish()
        second = runmgr.start_run("y")
        report(second)
        if restarts == 0:
            if second.rank == 1:
                sys.exit(7)
            time.sleep(60)
        second.finish()
        """,
        ranks=3,
        options=("--max-restarts=1", "--monitor-interval=0.1"),
    )
    assert done.returncode == 0, done.stderr
    for name in ("x", "y"):
        (path,) = (root / name).glob("RUN_*")
        for attempt, resumed in ((1, False), (2, True)):
            assert [reports[f"{name}.{rank}.{attempt}"] for rank in range(3)] == [
                [path.name, rank, 3, attempt, resumed] for rank in range(3)
            ]


def spawned(index, folder, world_size):
    os.environ["RUNMGR_CKPT_ROOT_DIR"] = f"{folder}/checkpoints"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=world_size)
    try:
        report = open_and_report(index)
        Path(folder, f"report{index}").write_text(json.dumps(report))
        with runmgr.start_run("x") as run:
            run.save({"n": index}, epoch=1)
    finally:
        dist.destroy_process_group()


def test_in_multiprocessing_spawn_over_a_file_store_without_environment(tmp_path, root):
    torch.multiprocessing.spawn(spawned, (str(tmp_path), 2), nprocs=2)
    reports = [json.loads((tmp_path / f"report{rank}").read_text()) for rank in range(2)]
    first, second = runs(root)  # nothing names the launch, so each start makes a run
    assert reports == [[first.name, rank, 2, 1] for rank in range(2)]
    assert (second / "ckpt_latest.pth").exists()


def test_an_initialised_group_knows_better_than_the_environment(root):
    def start_it(rank):
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "9"})
        return open_and_report(rank)

    found = values(run_ranks(3, start_it, store="group"))
    assert [place for _, *place in found] == [[rank, 3, 1] for rank in range(3)]
    assert len(runs(root)) == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "0", "PMI_SIZE": "2"},
        {"RANK": "3", "WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2"},
    ],
    ids=lambda variables: " ".join(f"{name}={value}" for name, value in variables.items()),
)
def test_several_ranks_without_store_or_group_are_an_error_and_nothing_is_created(variables, root):
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        with pytest.raises(AgreementError, match=next(iter(variables))):
            runmgr.start_run("x")
    assert time.monotonic() - begin < 10
    assert not root.exists()
    assert start._open_run is None


def test_starting_creates_no_cuda_context_and_maps_no_driver():
    code = """
import re, sys
def driver():
    return {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"libcuda\\.so|/dev/nvidia", line)}
import torch
alone = driver()
import runmgr
with runmgr.start_run("x") as run:
    run.save({"net": torch.nn.Linear(1, 1)}, epoch=1)
assert driver() == alone, driver() - alone
assert not torch.cuda.is_initialized()
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------- which run it is


def test_each_start_of_an_unnamed_launch_makes_a_new_run_with_a_greater_id(root):
    ids = [open_and_report(0)[0] for _ in range(5)]
    assert ids == sorted(set(ids))
    assert [path.name for path in runs(root)] == ids


def test_a_named_launch_continues_its_own_nth_run_whatever_its_status(monkeypatch, root):
    def start_three(_rank):
        opening._starts.clear()  # as in a new interpreter
        found = []
        for name in ("x", "y", "x"):
            with runmgr.start_run(name) as run:
                found.append((name, run.run_id, run.attempt, run.resumed))
        return found

    launches = ("job-17", "job-17", "job-18")
    first, second, other = (
        values(run_ranks(1, start_three, store="none", environ={"RUNMGR_LAUNCH_ID": name}))[0] for name in launches
    )
    assert [start[2:] for start in first] == [(1, False)] * 3
    assert [start[2:] for start in second] == [(2, True)] * 3
    assert [start[:2] for start in first] == [start[:2] for start in second]
    assert len({run_id for _, run_id, *_ in first}) == 3
    assert not {run_id for _, run_id, *_ in first} & {run_id for _, run_id, *_ in other}


def test_never_makes_a_new_run_and_a_later_auto_continues_the_newest_of_this_launch(monkeypatch, root):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RUNMGR_LAUNCH_ID", "job")
        environment.setattr(opening, "_starts", {})
        first = open_and_report(0)
        opening._starts.clear()
        fresh = open_and_report(0, resume="never")
        opening._starts.clear()
        again = open_and_report(0)
    assert first[0] != fresh[0]
    assert again[0] == fresh[0]
    assert again[3] == 2


@pytest.mark.parametrize("name", ["", "none"])
def test_an_empty_launch_name_names_nothing(name):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RUNMGR_LAUNCH_ID", name)
        environment.setattr(opening, "_starts", {})
        first = open_and_report(0)
        opening._starts.clear()
        assert open_and_report(0)[0] != first[0]


@pytest.mark.parametrize("name", ["../x", "a/b", "x\n", "x" * 300])
def test_a_launch_name_that_would_leave_its_place_is_refused(name, root):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RUNMGR_LAUNCH_ID", name)
        with pytest.raises(InvalidName, match="launch id"):
            runmgr.start_run("x")
    assert not list(root.glob("**/*.pth"))
    assert runs(root) == []


def test_latest_continues_the_newest_run_that_holds_a_checkpoint(root):
    ids = []
    for saves in (True, True, False):
        with runmgr.start_run("x") as run:
            if saves:
                run.save({"n": 1}, epoch=3)
            ids.append(run.run_id)
    with runmgr.start_run("x", resume="latest") as run:
        assert (run.run_id, run.attempt, run.resumed) == (ids[1], 2, True)
        assert run.restore({"n": 0}).epoch == 3


def test_latest_without_any_checkpoint_makes_a_new_run():
    first = open_and_report(0)
    found = open_and_report(0, resume="latest")
    assert found[0] > first[0]
    assert found[3] == 1


def test_run_id_continues_exactly_that_run_on_all_ranks(root):
    with runmgr.start_run("x", config={"lr": 1}) as run:
        wanted = run.run_id
    open_and_report(0)
    found = values(run_ranks(2, lambda rank: open_and_report(rank, run_id=wanted, config={"lr": 2})))
    assert [(run_id, attempt) for run_id, _, _, attempt in found] == [(wanted, 2)] * 2
    assert json.loads((root / "x" / wanted / "config.json").read_text()) == {"lr": 1}, "the config of attempt 1"


def test_a_run_that_is_not_there_is_named_with_the_nearest_ones():
    with runmgr.start_run("x") as run:
        near = run.run_id
    missing = near[:-1] + ("0" if near[-1] != "0" else "1")
    with pytest.raises(RunNotFound, match=f"{missing}.*did you mean {near}") as raised:
        runmgr.start_run("x", run_id=missing)
    assert isinstance(raised.value, FileNotFoundError)


def test_a_changed_monitor_or_mode_is_refused_and_leaves_the_run_as_it_was(root):
    with runmgr.start_run("x", monitor="loss", mode="min") as run:
        run.save({"n": 1}, epoch=1, metrics={"loss": 2})
        run_id = run.run_id
    for other in ({"monitor": "loss", "mode": "max"}, {"monitor": "accuracy", "mode": "min"}, {}):
        with pytest.raises(InvalidInput, match=r"monitor='loss', mode='min'"):
            runmgr.start_run("x", run_id=run_id, **other)
        assert runmgr.get_run("x", run_id).status == "completed"
    with runmgr.start_run("x", run_id=run_id, monitor="loss", mode="min") as run:
        assert run.restore({"n": 0}).metrics == {"loss": 2.0}


class Fork:
    """A parent run with two checkpoints, the first of them the best."""

    def __init__(self):
        with runmgr.start_run("x", monitor="accuracy", keep=runmgr.Keep(last=None)) as run:
            run.save({"n": "first"}, epoch=1, step=10, metrics={"accuracy": 0.9})
            run.save({"n": "second"}, epoch=2, step=20, metrics={"accuracy": 0.5})
            self.run_id, self.path = run.run_id, run.run_dir


@pytest.mark.parametrize(
    ("source", "epoch"),
    [
        (lambda parent: parent.run_id, 2),
        (lambda parent: parent.path / "ckpt_best.pth", 1),
        (lambda parent: str(parent.path / "ckpt_epoch_1.pth"), 1),
        (lambda parent: parent.path / ".runmgr" / "checkpoints" / "0001-000002.pth", 2),
    ],
    ids=["run id", "best", "epoch", "object"],
)
def test_a_fork_is_a_new_run_that_begins_at_the_checkpoint_and_says_where_it_came_from(source, epoch):
    parent = Fork()
    before = {path: path.stat().st_ino for path in parent.path.rglob("*.pth")}
    with runmgr.start_run("x", fork_from=source(parent), monitor="accuracy") as run:
        assert (run.attempt, run.resumed) == (1, False)
        assert run.run_id > parent.run_id
        progress = run.restore({"n": None})
        assert (progress.epoch, progress.step) == (epoch, epoch * 10)
        assert progress.values == {"n": {1: "first", 2: "second"}[epoch]}
        run.save({"n": "third"}, epoch=3, metrics={"accuracy": 0.1})
        assert torch.load(run.path("best"), weights_only=True)["n"] == "third", "a fork has its own best"
        said = json.loads((run.run_dir / "run.json").read_text())["parent"]
    assert said["run_id"] == parent.run_id
    assert len(said["digest"]) == 64
    assert {path: path.stat().st_ino for path in parent.path.rglob("*.pth")} == before
    assert torch.load(parent.path / "ckpt_latest.pth", weights_only=True)["n"] == "second"


def test_a_fork_from_nothing_makes_no_run(root):
    with pytest.raises(RunNotFound, match="fork_from='RUN_1'"):
        runmgr.start_run("x", fork_from="RUN_1")
    assert runs(root) == []


# --------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "options",
    [
        {"resume": "yes"},
        {"resume": None},
        {"mode": "maximum"},
        {"on_save_error": "ignore"},
        {"run_id": "../RUN_1"},
        {"run_id": "RUN_1", "resume": "latest"},
        {"run_id": "RUN_1", "fork_from": "RUN_2"},
        {"resume": "latest", "fork_from": "RUN_2"},
        {"tags": "word"},
        {"tags": ["a/b"]},
        {"keep": 3},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": "5"},
        {"ckpt_root_dir": ""},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_refused_and_nothing_is_created(options, root):
    with pytest.raises(InvalidInput):
        runmgr.start_run("x", **options)
    assert not root.exists()
    assert not list(root.parent.glob("*/x"))


@pytest.mark.parametrize("name", ["..", "a/b", "", " ", "a\0b", "a\nb", "-x", ".x", "x" * 300, None, 7])
def test_experiment_names_that_would_leave_the_root_are_refused(name, root):
    with pytest.raises(InvalidName):
        runmgr.start_run(name)
    assert not root.exists()


def test_a_second_run_in_one_process_is_refused_until_the_first_ends():
    first = runmgr.start_run("x")
    with pytest.raises(RunError, match=f"{first.run_id} is still open"):
        runmgr.start_run("x")
    first.finish()
    first.finish()
    open_and_report(0)


def test_a_bad_argument_on_one_rank_alone_is_an_error_on_all(root):
    outcomes = run_ranks(3, lambda rank: open_and_report(rank, tags=["a/b"] if rank == 2 else []))
    assert type(the_one_error(outcomes)) is InvalidName
    assert runs(root) == []


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (None, {}),
        ({"optimizer": {"lr": 0.1}, "path": Path("/data")}, {"optimizer": {"lr": 0.1}, "path": "/data"}),
        (__import__("argparse").Namespace(a=1, b=[2, (3,)]), {"a": 1, "b": [2, [3]]}),
    ],
)
def test_config_is_written_as_json(config, written):
    with runmgr.start_run("x", config=config) as run:
        assert json.loads((run.run_dir / "config.json").read_text()) == written


def test_secrets_are_masked_on_disk_and_listed_but_not_in_memory():
    config = {
        "lr": 1,
        "wandb": {"api_key": "abc123"},
        "hf_token": "abc123",
        "url": "https://me:abc123@host/x",
        "tokens": 5,
    }
    with runmgr.start_run("x", config=config) as run:
        assert run.config["hf_token"] == "abc123"
        record = json.loads((run.run_dir / "run.json").read_text())
        assert set(record["masked"]) == {"wandb.api_key", "hf_token", "url"}
        written = json.loads((run.run_dir / "config.json").read_text())
    assert written["tokens"] == 5
    for path in run.run_dir.rglob("*"):
        assert not path.is_file() or b"abc123" not in path.read_bytes(), path


def test_the_root_comes_from_the_argument_then_the_environment_then_the_scripts_project(tmp_path, root):
    script = tmp_path / "project" / "train" / "script.py"
    script.parent.mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    script.write_text(
        "import os, runmgr, sys\n"
        "given, said = sys.argv[1:]\n"
        "os.environ['RUNMGR_CKPT_ROOT_DIR'] = said\n"
        "with runmgr.start_run('x', ckpt_root_dir=given) as run: print(run.run_dir)\n"
        "with runmgr.start_run('x') as run: print(run.run_dir)\n"
        "del os.environ['RUNMGR_CKPT_ROOT_DIR']\n"
        "with runmgr.start_run('x') as run: print(run.run_dir)\n"
    )
    environ = clean_environment()
    environ.pop("RUNMGR_CKPT_ROOT_DIR")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "given"), str(tmp_path / "said")],
        env=environ, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    roots = [Path(line).parent.parent for line in done.stdout.splitlines()]
    assert roots == [tmp_path / "given", tmp_path / "said", tmp_path / "project" / "checkpoints"]


def test_a_script_that_has_left_its_directory_is_still_of_its_project_and_commit(tmp_path):
    """As Hydra leaves it with `hydra.job.chdir=True`."""
    script = tmp_path / "script.py"
    script.write_text("import os, runmgr\nos.chdir('/')\nwith runmgr.start_run('x') as run: print(run.run_dir)\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    script.write_text(script.read_text() + "# more\n")
    environ = clean_environment()
    environ.pop("RUNMGR_CKPT_ROOT_DIR")
    done = subprocess.run([sys.executable, "script.py"], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run_dir = Path(done.stdout.strip())
    assert run_dir.parent.parent == tmp_path / "checkpoints"
    found = json.loads((run_dir / "run.json").read_text())["git"]
    assert found["dirty"]
    assert "+# more" in found["diff"]


def test_the_runs_of_an_installed_module_lie_in_the_project_that_it_is_started_in(tmp_path):
    installed = tmp_path / "venv" / "site-packages"
    for directory in (installed, tmp_path / "project"):
        directory.mkdir(parents=True)
        (directory.parent / "pyproject.toml").touch()
    (installed / "job.py").write_text("from runmgr.disk.directory import default_root\nprint(default_root())\n")
    (tmp_path / "project" / "setup.py").touch()
    environ = clean_environment()
    environ.pop("RUNMGR_CKPT_ROOT_DIR")
    environ["PYTHONPATH"] = f"{installed}:{environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "job"], env=environ, cwd=tmp_path / "project", capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path / 'project' / 'checkpoints'}\n", done.stderr


# -------------------------------------------------------------------------------- one error on every rank, in time


def start_and_return(rank, options):
    with runmgr.start_run("x", **options):
        return rank


def assert_rank_0_could_not_create(outcomes, where: Path, cause: str):
    error = the_one_error(outcomes)
    assert type(error) is RankFailed
    assert error.rank == 0
    for part in (f"rank 0 on {HOST} could not create a run of 'x'", str(where), cause):
        assert part in str(error), str(error)


@pytest.mark.parametrize("store", ["agent", "group"])
def test_a_file_in_the_place_of_the_root_is_one_error_on_all(store, root):
    root.write_text("in the way")
    outcomes = run_ranks(4, start_and_return, {}, store=store)
    assert_rank_0_could_not_create(outcomes, root / "x", "NotADirectoryError")
    assert root.read_text() == "in the way"


def test_a_file_in_the_place_of_the_experiment_is_one_error_on_all(root):
    root.mkdir()
    (root / "x").write_text("in the way")
    outcomes = run_ranks(4, start_and_return, {}, store="group")
    assert_rank_0_could_not_create(outcomes, root / "x", "NotADirectoryError")


@pytest.mark.needs("root")
@pytest.mark.parametrize("store", ["agent", "group"])
def test_a_read_only_root_is_one_error_on_all(store, root):
    with read_only(root):
        outcomes = run_ranks(4, start_and_return, {}, store=store)
        assert_rank_0_could_not_create(outcomes, root, "Read-only file system")
        assert list(root.iterdir()) == []


@pytest.mark.needs("root")
@pytest.mark.parametrize("store", ["agent", "group"])
def test_a_full_disk_is_one_error_on_all_and_leaves_no_run(store, root):
    with small_disk(root, 1 << 20):
        fill(root)
        outcomes = run_ranks(4, start_and_return, {}, store=store)
        assert_rank_0_could_not_create(outcomes, root, "No space left on device")
        assert runs(root) == []


@pytest.mark.parametrize("store", ["agent", "group"])
def test_a_rank_that_never_comes_to_start_run_is_named_on_every_rank_that_came(store, root):
    def come_or_not(rank):
        if rank == 3:
            time.sleep(5)
            return None
        return start_and_return(rank, {"timeout_s": 3})

    error = the_one_error(run_ranks(4, come_or_not, store=store)[:3])
    assert type(error) is RankTimeout
    assert error.ranks == [3]
    assert runs(root) == []


def test_a_host_that_does_not_see_the_directory_is_named_on_all_and_the_run_taken_back(root, monkeypatch):
    """Rank 1 plays a second host: its own name, and another directory under the same path."""
    from runmgr import ranks
    from runmgr.disk import directory

    def start_it(rank):
        if rank == 1:
            monkeypatch.setattr(ranks.socket, "gethostname", lambda: "node-b")
            original = claiming.confirm_shared
            elsewhere = lambda run, *args, **options: original(  # noqa: E731
                directory.RunDirectory(root / "elsewhere" / run.run_id), *args, **options
            )
            (root / "elsewhere").mkdir(parents=True)
            monkeypatch.setattr(claiming, "confirm_shared", elsewhere)
        return start_and_return(rank, {})

    error = the_one_error(run_ranks(3, start_it))
    assert type(error) is NotShared
    assert error.host == "node-b"
    assert runs(root) == []
    assert list((root / "elsewhere").iterdir()) == []


def test_after_an_error_the_same_ranks_can_start_again(root):
    def twice(rank):
        with pytest.raises(RunError):
            runmgr.start_run("x", run_id="RUN_missing")
        agreed = agreement._shared
        return agreed, open_and_report(rank)[0]

    found = values(run_ranks(2, twice, store="group"))
    assert {agreed for agreed, _ in found} == {None}
    assert [path.name for path in runs(root)] == [found[0][1]]


def test_a_start_that_fails_on_another_host_removes_only_what_it_made(root, monkeypatch):
    foreign = root / "exp" / "RUN_20240101_000000_000000"
    foreign.mkdir(parents=True)
    torch.save({"net": {}, "epoch": 3}, foreign / "ckpt_latest.pth")

    def not_shared(run, *_, **__):
        raise runmgr.NotShared("not shared", host="h", path=str(run.path))

    monkeypatch.setattr(claiming, "confirm_shared", not_shared)  # there is no second host here
    with pytest.raises(runmgr.NotShared):
        runmgr.start_run("exp", run_id=foreign.name)
    assert (foreign / "ckpt_latest.pth").exists()
    with pytest.raises(runmgr.NotShared):
        runmgr.start_run("exp")
    assert [path.name for path in (root / "exp").iterdir() if path.name.startswith("RUN_")] == [foreign.name]
    assert not (foreign / ".runmgr/lease").exists()
