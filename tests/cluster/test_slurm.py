"""Under a real Slurm: one run for each training of a job, continued when the job is requeued."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from hosts import hosts
from pages import blocks
from processes import REPOSITORY
from slurm import CREDENTIALS_S, LAUNCH, Slurm

TOOLS = ("root", "nsenter", "ip", "slurmctld", "slurmd", "munged", "setpriv")
pytestmark = [pytest.mark.long, *(pytest.mark.needs(tool) for tool in TOOLS)]
JOB = Path(__file__).with_name("slurm_job.py")
PYTHON = f"{sys.executable} {JOB}"
ENDLESS = "1000000"


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    with hosts(2, tmp_path_factory.mktemp("hosts")) as cluster:
        Slurm(cluster, tmp_path_factory.mktemp("slurm")).up()
        yield cluster


@pytest.fixture
def slurm(controller, tmp_path):
    return Slurm(controller, tmp_path)


@pytest.fixture(scope="module")
def warned(controller, tmp_path_factory):
    """Jobs that Slurm warns: it looks every 30 s, so they wait for it while other tests run.

    The warning ends a process that does not listen yet, so it comes late enough for a busy machine to have imported torch.
    """
    made = Slurm(controller, tmp_path_factory.mktemp("warned"))
    options = ("--time=3", "--nodes=1", "--ntasks=1", "--requeue")
    training = (LAUNCH, "--nproc-per-node=1", JOB, ENDLESS)
    jobs = [made.submit(f"job-{number}", *options, f"--signal={signal}@70", *training)
            for number, signal in enumerate(("USR1", "B:USR1"))]  # fmt: skip
    return made.folder / "checkpoints", jobs


def runs(root) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(root.glob("job/RUN_*/run.json"))}


def test_the_tasks_of_an_array_make_a_run_each(slurm, root):
    slurm.submit("array", "--array=0-19", "--ntasks=1", slurm.script("array", f"exec {PYTHON} 0")).wait_for("end", 20)
    assert len(runs(root)) == 20
    assert {run["attempt"] for run in runs(root).values()} == {1}


def test_a_requeued_launch_on_two_nodes_stops_together_and_goes_on_there(slurm, root):
    job = slurm.submit("two", "--nodes=2", "--ntasks-per-node=2", LAUNCH, "--nproc-per-node=1", JOB, ENDLESS)
    job.wait_for("saved")
    job.requeue()
    (_, run_id, attempt, step, world, *_), again = job.wait_for("start", 2)
    (stopped,) = job.lines("stop")
    assert (attempt, step, world) == ("1", "0", "2")
    assert again == ["start", run_id, "2", stopped[2], "2"]
    assert stopped[1] == run_id
    assert list(runs(root)) == [run_id]
    record = json.loads((root / "job" / run_id / ".runmgr/attempts/0001.json").read_text())
    assert record["status"] == "preempted"
    assert [host["host"] for host in record["hosts"]] == ["host1", "host2"]
    assert "srun --nodes=2 --ntasks=2" in job.printed()
    assert job.printed().count("--rdzv-endpoint=host1:") == 4  # by each node, in each start
    job.cancel()


def test_each_training_of_a_job_continues_its_own_run(slurm, root):
    script = slurm.script(
        "several",
        f"{PYTHON} 5 short\n"
        f"srun --ntasks=1 --exact {PYTHON} {ENDLESS} left &\n"
        f"srun --ntasks=1 --exact {PYTHON} {ENDLESS} right &\n"
        "wait",
    )
    job = slurm.submit("several", "--ntasks=2", script)
    job.until(lambda: len({line[1] for line in job.lines("saved")}) == 2)
    job.requeue()
    starts = {(line[2], line[5]): line for line in job.wait_for("start", 6)}
    stopped = {line[1]: line[2] for line in job.lines("stop") + job.lines("end")}
    for name in ("short", "left", "right"):
        first, again = starts["1", name], starts["2", name]
        assert again[1] == first[1]
        assert again[3] == stopped[first[1]]
    assert len(runs(root)) == 3
    job.cancel()


def test_what_is_started_by_hand_in_one_allocation_are_runs_of_their_own(warned, slurm, root):
    slurm.call("salloc", "--ntasks=1", "bash", "-c", f"{PYTHON} 0 && {PYTHON} 0 && srun {PYTHON} 0")
    assert [run["attempt"] for run in runs(root).values()] == [1] * 3


def test_plain_srun_is_one_launch_with_a_process_group_and_one_clear_error_without(slurm, root):
    job = ("srun", "--nodes=2", "--ntasks=2", sys.executable, JOB, "0")
    refused = slurm.call(*job, fails=True)
    assert refused.count("Call torch.distributed.init_process_group() before runmgr.start_run()") == 2
    assert runs(root) == {}
    printed = slurm.call("env", "GROUP_PORT=29555", *job)
    assert len(runs(root)) == 1
    assert next(iter(runs(root).values()))["world_size"] == 2
    assert printed.count("start") == 1


def test_the_warning_before_the_end_stops_a_training_whichever_way_slurm_sends_it(warned):
    root, jobs = warned
    stopped = [job.wait_for("stop")[0] for job in jobs]
    for job in jobs:
        job.until(lambda job=job: job.state() == "COMPLETED")
    assert {run_id for _, run_id, _ in stopped} == set(runs(root))
    assert [(run["status"], run["attempt"]) for run in runs(root).values()] == [("preempted", 1)] * 2
    time.sleep(CREDENTIALS_S + 1)  # until then a node refuses the credentials of a job that has ended
    for job in jobs:
        job.requeue()
    for job, (_, run_id, step) in zip(jobs, stopped, strict=True):
        assert job.wait_for("start", 2)[1][:4] == ["start", run_id, "2", step]
        job.cancel()
    assert len(runs(root)) == 2


def script_of(page: str, slurm: Slurm, name: str, **changed: str) -> Path:
    """Return the batch script that a page shows, with this training in place of the page's."""
    (code,) = (code for code in blocks((REPOSITORY / page).read_text(), "bash") if f"# {name}.sbatch" in code)
    everywhere = {
        "source .venv/bin/activate\n": "",
        "python": sys.executable,
        "runmgr ls": f"{sys.executable} -m runmgr.cli ls",
    }
    for shown, meant in (everywhere | changed).items():
        assert shown in code or shown in everywhere
        code = code.replace(shown, meant)
    path = slurm.folder / f"{name}.sbatch"
    path.write_text(code)
    return path


def test_a_job_that_a_more_important_one_displaces_goes_on_afterwards(slurm, root):
    """Slurm requeues such a job only while its script runs, so the script asks for it."""
    changed = {"--gpus-per-node=8": "--exclusive", "train.py": f"--nproc-per-node=1 {JOB} {ENDLESS}", "sums": "job"}
    script = script_of("docs/how-to/slurm.md", slurm, "train", **changed)
    job = slurm.submit("low", script)
    job.wait_for("saved")
    high = slurm.submit(
        "high", "--partition=high", "--nodes=2", "--exclusive", slurm.script("high", "echo runs; sleep 2")
    )
    ((_, run_id, step),) = job.wait_for("stop")
    high.wait_for("runs")
    assert runs(root)[run_id]["status"] == "preempted"
    job.start_now()
    assert job.wait_for("start", 2)[1][:4] == ["start", run_id, "2", step]
    job.cancel()


def test_a_task_of_an_array_goes_on_when_it_is_requeued(slurm, root):
    changed = {"--array=0-3": "--array=0-1", "--gpus-per-node=1 ": "", "train.py --lr": f"{JOB} {ENDLESS}"}
    array = slurm.submit("sweep", script_of("docs/how-to/sweeps.md", slurm, "sweep", **changed))
    array.until(lambda: len({line[1] for line in array.lines("saved")}) == 2)
    (of_task,) = (line[1] for line in array.lines("start") if line[5] == "0.01")
    task = array.task(1)
    task.requeue()
    again = array.wait_for("start", 3)[2]
    (stopped,) = array.lines("stop")
    assert stopped[1] == of_task
    assert again == ["start", of_task, "2", stopped[2], "1", "0.01"]
    assert len(runs(root)) == 2
    array.cancel()
