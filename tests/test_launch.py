"""The torchrun command that `scripts/launch.sh` makes, from GPUs, Slurm or nothing."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

import pytest
from processes import REPOSITORY, run

from runmgr import launch
from runmgr.errors import InvalidInput

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "gpu[08-09,12]",
    "SLURM_GPUS_ON_NODE": "4",
}
STEP = {
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[08-09,12]",
    "SLURM_STEP_ID": "2",
}
SRUN = "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1"
ONE_NODE = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
SHELL = ONE_NODE | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "gpu08"}  # salloc's, on the first node
AGAIN = f"{sys.executable} -m runmgr.launch"
C10D = "--nnodes=3 --rdzv-backend=c10d --rdzv-endpoint=gpu08"
TORCHRUN = f"{sys.executable} -m torch.distributed.run"
RELAY = f"{sys.executable} -m runmgr.relay"


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        ("", {"CUDA_VISIBLE_DEVICES": ""}, "--standalone --nproc-per-node=2 -m runmgr.examples.digits"),
        ("", {"CUDA_VISIBLE_DEVICES": "0,3,5"}, "--standalone --nproc-per-node=3 -m runmgr.examples.digits"),
        ("", {"CUDA_VISIBLE_DEVICES": "1,-1,2"}, "--standalone --nproc-per-node=1 -m runmgr.examples.digits"),
        ("a.py --lr 3", {"CUDA_VISIBLE_DEVICES": "0"}, "--standalone --nproc-per-node=1 a.py --lr 3"),
        ("-m pack.age -x", {"CUDA_VISIBLE_DEVICES": "0"}, "--standalone --nproc-per-node=1 -m pack.age -x"),
        ("--nproc_per_node 4 a.py", {}, "--standalone --nproc_per_node 4 a.py"),
        ("--nproc-per-node=4 a.py", {}, "--standalone --nproc-per-node=4 a.py"),
        ("--standalone --max-restarts 3 a.py --nnodes 2", {"CUDA_VISIBLE_DEVICES": "0"},
         "--nproc-per-node=1 --standalone --max-restarts 3 a.py --nnodes 2"),
        ("--nnodes=2 --rdzv-endpoint=h:1 a.py", {"CUDA_VISIBLE_DEVICES": "0"},
         "--nproc-per-node=1 --nnodes=2 --rdzv-endpoint=h:1 a.py"),
        ("a.py --lr 3", SLURM, f"{SRUN} {AGAIN} a.py --lr 3"),
        ("--max-restarts 2 -m a", SLURM, f"{SRUN} {AGAIN} --max-restarts 2 -m a"),
        ("a.py", SLURM | {"SLURM_GPUS_PER_TASK": "1"}, f"env --unset=SLURM_GPUS_PER_TASK {SRUN} {AGAIN} a.py"),
        ("a.py", SLURM | {"SLURM_JOB_NUM_NODES": "1"}, f"{SRUN.replace('=3', '=1')} {AGAIN} a.py"),
        ("a.py", SLURM | SHELL, f"{SRUN} {AGAIN} a.py"),
        ("a.py", SLURM | STEP, f"{RELAY} {C10D}:21234 --rdzv-id=77.2 --nproc-per-node=4 a.py"),
        ("a.py", SLURM | STEP | ONE_NODE, f"{RELAY} --standalone --nproc-per-node=4 a.py"),
        ("--nnodes=1 a.py", SLURM, f"{RELAY} --nproc-per-node=4 --nnodes=1 a.py"),
    ],
)  # fmt: skip
def test_the_command_fills_in_what_was_left_out(arguments, environ, expected):
    argv, _ = launch.command(launch.parse(arguments.split()), environ)
    assert shlex.join(argv) == (expected if sys.executable in expected else f"{TORCHRUN} {expected}")


@pytest.mark.parametrize(
    ("environ", "expected"), [({}, {"OMP_NUM_THREADS": "4"}), ({"OMP_NUM_THREADS": "1"}, {})], ids=["unset", "set"]
)
def test_threads_are_shared_out_unless_the_user_did(monkeypatch, environ, expected):
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(8)))
    _, added = launch.command(launch.parse([]), environ | {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert added == expected


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("n[08-11,20],gpu3", "n08"), ("rack[1-2]n[3-4]", "rack1n3"), ("n[7]", "n7"),
        ("a-b[3,5]", "a-b3"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_slurm_node_list(node_list, first):
    assert launch.first_host(node_list) == first


def test_a_step_with_several_tasks_a_node_is_refused():
    with pytest.raises(InvalidInput, match="ntasks-per-node=1"):
        launch.command(launch.parse(["a.py"]), SLURM | STEP | {"SLURM_STEP_NUM_TASKS": "12"})


def test_a_module_option_without_a_module_is_refused(capsys):
    assert launch.main(["-m"]) == 2
    assert "needs the name of a module" in capsys.readouterr().err


def test_the_script_explains_itself_and_prints_its_command():
    script = str(REPOSITORY / "scripts/launch.sh")
    helped = run("bash", script, "--help")
    assert helped.returncode == 0
    assert "usage: launch.sh" in helped.stdout
    printed = run("bash", script, "--dry-run", "train.py", "--epochs", "3", CUDA_VISIBLE_DEVICES="")
    assert printed.returncode == 0
    assert printed.stdout.endswith("-m torch.distributed.run --standalone --nproc-per-node=2 train.py --epochs 3\n")


def test_a_copy_of_the_script_in_slurms_spool_finds_its_home(tmp_path):
    spool, tools, home = tmp_path / "spool/job00007", tmp_path / "bin", tmp_path / "my project/scripts"
    for folder in (spool, tools, home):
        folder.mkdir(parents=True)
    for name in ("launch.sh", "setup.sh"):
        shutil.copy(REPOSITORY / "scripts" / name, home / name)
    script = shutil.copy(home / "launch.sh", spool / "slurm_script")
    told = {
        "SLURM_JOB_ID": "7",
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "VIRTUAL_ENV": sys.prefix,
    }
    (tools / "scontrol").write_text(
        f'#!/bin/sh\necho "JobId=$3 JobName=x"; echo "   Command={home}/launch.sh a.py /launch.sh"\n'
    )
    (tools / "scontrol").chmod(0o755)
    copied = ("env", f"--chdir={spool}", "bash", script, "--dry-run", "a.py")
    by_slurm = run(*copied, **told)
    assert (by_slurm.returncode, by_slurm.stdout[-5:]) == (0, "a.py\n"), by_slurm.stderr
    (tools / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    by_folder = run(*copied, SLURM_SUBMIT_DIR=str(home.parent), **told)
    assert by_folder.stdout == by_slurm.stdout


def test_the_script_hands_on_arguments_with_spaces_and_the_exit_status(tmp_path):
    script = tmp_path / "my train.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(0 if sys.argv[1] == 'a b' else 1)")
    launcher = str(REPOSITORY / "scripts/launch.sh")
    good = run("bash", launcher, "--nproc-per-node=1", str(script), "a b", "*")
    assert (good.returncode, good.stdout) == (0, "['a b', '*']\n")
    assert run("bash", launcher, "--nproc-per-node=1", str(script), "c").returncode != 0
