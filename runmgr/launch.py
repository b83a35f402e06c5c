"""The torchrun command line, from Slurm, GPUs or nothing; `scripts/launch.sh` calls it.

usage: launch.sh [--dry-run] [torchrun options] [script.py [args] | -m module [args]]

Without a script the demo runs: a small CNN on handwritten digits (`runmgr.examples.digits`).

What you leave out is filled in:
  one host      --standalone, and one process per GPU (CUDA_VISIBLE_DEVICES counts), or two on the CPU
  Slurm         sbatch [options] launch.sh train.py, or inside salloc: one torchrun on each node, started by srun;
                inside a step of srun with one task a node: this node's torchrun. Rendezvous on the first node, one
                process per GPU of a node. SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@60, with or without B:) reach
                the processes
  OMP_NUM_THREADS  cores divided by processes, unless it is set

  --dry-run     print the command instead of running it
  -h, --help    print this; for torchrun's own options: python -m torch.distributed.run --help
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runmgr import ranks
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEMO = ("-m", "runmgr.examples.digits")
CPU_PROCESSES = 2
_FLAGS = {"--standalone", "--no-python", "--run-path", "--virtual-local-rank"}
_WHERE = {"--standalone", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--master-addr"}
_FIRST_PORT, _PORTS = 20_000, 10_000
# What an allocation's options say of its tasks would give srun's one task a node a part of the node only.
_PER_TASK = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_MEM_PER_GPU")


class Request(NamedTuple):
    """A command line taken apart: torchrun's options, then what it shall run."""

    options: list[str]
    program: list[str]
    dry_run: bool = False
    wants_help: bool = False

    def gives(self, *names: str) -> bool:
        """Whether one of these torchrun options is among those given, in either spelling."""
        given = {option.split("=", 1)[0].replace("_", "-") for option in self.options if option.startswith("--")}
        return bool(given & set(names))


def parse(arguments: Sequence[str]) -> Request:
    """Take the command line apart without knowing the script's own options."""
    options: list[str] = []
    dry_run = wants_help = False
    rest = list(arguments)
    while rest:
        argument = rest[0]
        if argument in {"-m", "--module"}:
            if len(rest) == 1:
                raise InvalidInput(f"{argument} needs the name of a module, such as -m runmgr.examples.digits")
            return Request(options, ["-m", *rest[1:]], dry_run, wants_help)
        if not argument.startswith("-"):
            return Request(options, rest, dry_run, wants_help)
        rest.pop(0)
        if argument == "--dry-run":
            dry_run = True
        elif argument in {"-h", "--help"}:
            wants_help = True
        else:
            options.append(argument)
            name = argument.replace("_", "-")
            if "=" not in argument and name not in _FLAGS and rest:
                options.append(rest.pop(0))
    return Request(options, list(DEMO), dry_run, wants_help)


def command(request: Request, environ: Mapping[str, str] = os.environ) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs the request here, and the variables to add to its environment."""
    in_slurm = "SLURM_JOB_ID" in environ and not request.gives(*_WHERE)
    if in_slurm and ranks.slurm_step(environ) is None:
        return [*_srun(environ), sys.executable, "-m", "runmgr.launch", *request.options, *request.program], {}
    torchrun = [sys.executable, "-m", "runmgr.relay" if "SLURM_JOB_ID" in environ else "torch.distributed.run"]
    options = list(request.options)
    processes = None
    if not request.gives("--nproc-per-node"):
        processes = _processes_per_node(environ)
        options = [f"--nproc-per-node={processes}", *options]
    if not request.gives(*_WHERE):
        options = [*(_rendezvous(environ) if in_slurm else ["--standalone"]), *options]
    added = {}
    if "OMP_NUM_THREADS" not in environ and processes is not None:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return [*torchrun, *options, *request.program], added


def _srun(environ: Mapping[str, str]) -> list[str]:
    """Return what starts this launcher again, once on each node of the allocation, with all of the node's resources.

    Also for one node: salloc's shell may be on another one, and Slurm sends `--signal` to steps only. srun hands the
    signals that it gets itself on to the steps' tasks.
    """
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    unset = [f"--unset={name}" for name in _PER_TASK if name in environ]
    return [
        *(["env", *unset] if unset else []),
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1",
    ]  # fmt: skip


def _rendezvous(environ: Mapping[str, str]) -> list[str]:
    """Return the torchrun options for the step that this process is a task of: its node's agent."""
    tasks, nodes = (int(environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("TASKS", "NODES"))
    if tasks != nodes:
        raise InvalidInput(
            f"this step has {tasks} tasks on {nodes} nodes, but torchrun itself starts the processes of a node; use "
            f"srun --ntasks-per-node=1, or start it without srun"
        )
    if nodes == 1:
        return ["--standalone"]
    job, step = environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]
    port = _FIRST_PORT + (int(job) * 16 + int(step)) % _PORTS
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        f"--rdzv-id={job}.{step}",
    ]


def first_host(node_list: str) -> str:
    """Return the first name of a Slurm node list: `n1`, `n[08-11,20],gpu3`, `rack[1-2]n[1-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if first is None:
        raise InvalidInput(f"the Slurm node list {node_list!r} names no node")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _processes_per_node(environ: Mapping[str, str]) -> int:
    """Return the GPUs of this node that may be used, or two processes where there is none."""
    if (on_node := environ.get("SLURM_GPUS_ON_NODE", "")).isdecimal() and int(on_node) > 0:
        return int(on_node)
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [name.strip() for name in visible.split(",")]
        usable = named[: named.index("-1")] if "-1" in named else named
        return sum(bool(name) for name in usable) or CPU_PROCESSES
    return len(gpus()) or CPU_PROCESSES


def gpus() -> list[str]:
    """Return this host's NVIDIA GPUs, asked from the driver's files or nvidia-smi; no CUDA context is made."""
    listed = Path("/proc/driver/nvidia/gpus")
    if listed.is_dir():
        return sorted(os.listdir(listed))
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)  # noqa: S607  # wherever it is
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")] if done.returncode == 0 else []


def main(arguments: Sequence[str] | None = None) -> int:  # noqa: RET503  # exec does not return
    """Replace this process by torchrun; returns only for --help, --dry-run and errors."""
    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
        if request.wants_help:
            print(__doc__)
            return 0
        argv, added = command(request)
    except InvalidInput as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    shown = " ".join([*(f"{name}={value}" for name, value in added.items()), shlex.join(argv)])
    if request.dry_run:
        print(shown)
        return 0
    print(f"launch: {shown}", file=sys.stderr, flush=True)
    os.environ.update(added)
    os.execvp(argv[0], argv)  # noqa: S606  # signals and the exit status are torchrun's own this way


if __name__ == "__main__":
    sys.exit(main())
