"""Real processes for tests: N ranks that share a store or a group, real torchrun, and no survivors.

`run_ranks` forks this process, so a rank costs milliseconds instead of an `import torch`. Everything in it is real but
the agent: where `store="agent"`, a process of ours hosts the TCPStore that torchrun's agent would. Not this process:
it forks, and the store's threads would leave their locks held in the children.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What a start, an optimizer and a TensorBoard writer import when they need it: seconds, which no forked rank pays again.
import torch._dynamo
import torch.distributed as dist
import torch.utils.tensorboard
from filelock import FileLock, SoftFileLease  # noqa: F401
from sizes import size

with contextlib.suppress(ModuleNotFoundError):  # before torch 2.7
    import torch.utils.serialization.config  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

REPOSITORY = Path(__file__).resolve().parent.parent
TORCHRUN_RANKS = size(3, 8)  # each is an interpreter that imports torch
LAUNCH_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "RUNMGR_LAUNCH_ID",
    "SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_END_TIME",
)  # fmt: skip


@dataclass
class Outcome:
    """What one rank's function returned or raised; `signal` when something killed the process."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    signal: int | None = None
    seconds: float = 0.0
    output: str = ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's traces, nor what pytest's own workers are told of the terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in {*LAUNCH_VARIABLES, "COLUMNS", "LINES"}}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | more


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    store: str = "agent",
    absent: tuple[int, ...] = (),
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> list[Outcome]:
    """Run `function(rank, *args)` in `world_size` real processes and return their outcomes in rank order.

    store   "agent": torchrun's variables and a store; "group": a gloo process group made before `function`, with
            torchrun's variables absent; "none": RANK and WORLD_SIZE alone
    absent  ranks that never start
    """
    hosting = agent() if store == "agent" else contextlib.nullcontext(free_port())
    with tempfile.TemporaryDirectory() as folder, hosting as port:
        children = {
            rank: _fork(rank, world_size, function, args, store, port, Path(folder), dict(environ or {}))
            for rank in range(world_size)
            if rank not in absent
        }
        try:
            return [_reap(rank, pid, Path(folder), timeout_s) for rank, pid in children.items()]
        finally:
            for pid in children.values():
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):  # after a time-out of the test itself
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)


@contextlib.contextmanager
def agent() -> Iterator[int]:
    """A process that hosts a store, as torchrun's agent does; yields its port."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writing, str(store.port).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        yield int(os.read(reading, 16))
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def values(outcomes: list[Outcome]) -> list[Any]:
    """The values, after making sure that nobody raised or died."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
        assert outcome.signal is None, f"rank {outcome.rank} died of signal {outcome.signal}\n{outcome.output}"
    return [outcome.value for outcome in outcomes]


def _fork(rank, world_size, function, args, store, port, folder, environ) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if store == "agent":
            os.environ |= address | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
        os.environ |= environ
        if store == "group":
            os.environ |= address
            dist.init_process_group("gloo")
            assert dist.get_world_size() == world_size
            for name in LAUNCH_VARIABLES:
                os.environ.pop(name, None)
        outcome = Outcome(rank)
        start = time.monotonic()
        try:
            outcome.value = function(rank, *args)
        except BaseException as error:  # noqa: BLE001  # the parent judges
            outcome.error = error
            traceback.print_exc()
        outcome.seconds = time.monotonic() - start
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    finally:
        os._exit(code)


def _reap(rank: int, pid: int, folder: Path, timeout_s: float) -> Outcome:
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    output = (folder / f"{rank}.out").read_text(errors="replace") if (folder / f"{rank}.out").exists() else ""
    result = folder / f"{rank}.pickle"
    if result.exists():
        outcome = pickle.loads(result.read_bytes())
    else:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        assert number is not None, f"rank {rank} left nothing:\n{output}"
        outcome = Outcome(rank, signal=number)
    outcome.output = output
    return outcome


def torchrun(
    *command: str, ranks: int = 2, options: tuple[str, ...] = (), timeout_s: float = 240.0, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --standalone --nproc-per-node=ranks <options> <command>` to its end, output captured."""
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *options,
        *command,
    ]
    return run(*argv, timeout_s=timeout_s, **environ)


def run(*argv: str, timeout_s: float = 240.0, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a clean environment; after the time-out all of its processes are killed."""
    with subprocess.Popen(
        argv, env=clean_environment(**environ), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def start_ranks(world_size: int, function: Callable[..., Any], *args: Any, port: int, folder: Path) -> list[int]:
    """Fork ranks under torchrun's variables and return their pids at once; `end_ranks` must follow."""
    return [_fork(rank, world_size, function, args, "agent", port, folder, {}) for rank in range(world_size)]


def end_ranks(pids: list[int], after_s: float) -> bool:
    """Wait for the ranks up to `after_s`, or until one fails, then kill -9 those that live. True when all ended with 0."""
    deadline = time.monotonic() + after_s
    left, clean = set(pids), True
    while left:
        for pid in sorted(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.discard(pid)
                clean = clean and status == 0
        if left and (time.monotonic() > deadline or not clean):
            clean = False
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)
    return clean


def kill(pids: list[int]) -> None:
    """Kill -9 and wait until they have ended; who waits for them need not be this process."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.005)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for candidate in found:
        found += [child for child, parent in parents.items() if parent == candidate]
    return found[1:]
