"""The torchrun command line, from Slurm, GPUs or nothing; `scripts/launch.sh` calls it.

usage: launch.sh [--dry-run] [torchrun options] [script.py [args] | -m module [args]]

Without a script the demo runs: a small CNN on handwritten digits (`runmgr.examples.digits`).

What you leave out is filled in:
  one host      --standalone, and one process per GPU (CUDA_VISIBLE_DEVICES counts), or two on the CPU
  Slurm         inside an allocation (sbatch, salloc, srun): its nodes, a rendezvous on the first of them,
                and one process per GPU of a node
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

from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEMO = ("-m", "runmgr.examples.digits")
CPU_PROCESSES = 2
_FLAGS = {"--standalone", "--no-python", "--run-path", "--virtual-local-rank"}
_WHERE = {"--standalone", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--master-addr"}
_FIRST_PORT, _PORTS = 20_000, 10_000


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
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    prefix: list[str] = []
    options = list(request.options)
    processes = None
    if not request.gives("--nproc-per-node"):
        processes = _processes_per_node(environ)
        options = [f"--nproc-per-node={processes}", *options]
    if not request.gives(*_WHERE):
        if "SLURM_JOB_ID" in environ:
            prefix, where = _slurm(environ)
            options = [*where, *options]
        else:
            options = ["--standalone", *options]
    added = {}
    if "OMP_NUM_THREADS" not in environ and processes is not None:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return [*prefix, *torchrun, *options, *request.program], added


def _slurm(environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the srun prefix and the torchrun options for the allocation that this process is in.

    As one of several tasks of a step, this process is its node's agent. In a batch script or an interactive shell
    it starts one agent on each node through srun.
    """
    in_step = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    nodes = int(environ.get("SLURM_STEP_NUM_NODES" if in_step else "SLURM_JOB_NUM_NODES", "1"))
    if in_step and int(environ["SLURM_STEP_NUM_TASKS"]) != nodes:
        raise InvalidInput(
            f"this step has {environ['SLURM_STEP_NUM_TASKS']} tasks on {nodes} nodes, but torchrun itself starts the "
            f"processes of a node; use srun --ntasks-per-node=1, or call launch.sh without srun"
        )
    if nodes == 1:
        return [], ["--standalone"]
    job, step = environ["SLURM_JOB_ID"], environ.get("SLURM_STEP_ID", "0") if in_step else "0"
    first = first_host(environ["SLURM_STEP_NODELIST" if in_step else "SLURM_JOB_NODELIST"])
    port = _FIRST_PORT + (int(job) * 16 + int(step)) % _PORTS
    where = [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first}:{port}",
        f"--rdzv-id={job}.{step}",
    ]
    prefix = [] if in_step else ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return prefix, where


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
