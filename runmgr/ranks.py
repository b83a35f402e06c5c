"""Who am I: rank, world size, host and launch, read from the environment that the launcher set.

The first pair of variables that is complete wins:

=====================  ==========================  =========================
launcher               rank                        world size
=====================  ==========================  =========================
torchrun, or by hand   RANK                        WORLD_SIZE
srun                   SLURM_PROCID                SLURM_STEP_NUM_TASKS
mpirun (Open MPI)      OMPI_COMM_WORLD_RANK        OMPI_COMM_WORLD_SIZE
mpiexec (PMI)          PMI_RANK                    PMI_SIZE
=====================  ==========================  =========================

A process group that is initialised knows better than any of them; see `worker/agreement.py`.
"""

from __future__ import annotations

import os
import socket
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runmgr.errors import AgreementError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PAIRS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_NO_IDENTITY = ("", "none")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # salloc's own shell, the batch script and their kin have step ids above this


class Ranks(NamedTuple):
    """One process's place in its launch. `source` names the variables (or the group) that said so."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    source: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0


def from_environment(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read this process's place; alone when no launcher left a trace, an error when a launcher left half of one."""
    host = socket.gethostname()
    for rank_name, size_name, local_name in _PAIRS:
        if rank_name in environ and size_name in environ:
            rank, size = _number(environ, rank_name), _number(environ, size_name)
            if not 0 <= rank < size:
                raise AgreementError(
                    f"{rank_name}={rank} and {size_name}={size} contradict each other: a rank is at least 0 and "
                    f"smaller than the world size. Start through torchrun, or set both."
                )
            local_rank = _number(environ, local_name) if local_name in environ else 0
            return Ranks(rank, size, local_rank, host, f"{rank_name} and {size_name}")
    for rank_name, size_name, _ in _PAIRS:
        if size_name in environ and _number(environ, size_name) > 1:
            raise AgreementError(
                f"{size_name}={environ[size_name]} is set but {rank_name} is not, so this process cannot know its "
                f"rank. Start through torchrun, set {rank_name}, or unset {size_name}."
            )
    return Ranks(0, 1, 0, host, "no launcher")


def agent_store_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Where the torchrun agent's own store listens, or None when torchrun did not start this process."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or "MASTER_ADDR" not in environ:
        return None
    return environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")


class SlurmStart(NamedTuple):
    """A process's place in a Slurm job that may be requeued."""

    job: str  # with the cluster's name where Slurm gives one; a task of an array is a job of its own
    restart: int  # how often the job was requeued before
    step: str  # the step that srun made, or "batch" for a process of the script (or of salloc's shell) itself


def launch_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The name that the user gave to this launch, the same in each of its restarts, or None."""
    given = environ.get("RUNMGR_LAUNCH_ID", "")
    return None if given in _NO_IDENTITY else given


def torchrun_error_file(local_rank: int, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where a rank of this host that is decorated with torch's `record` writes its error, or None without torchrun."""
    own = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / str(local_rank) / Path(own).name if own else None


def torchrun_agent_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that this host's torchrun agent made for its workers' logs, or None without torchrun.

    No two agents have the same one, and one agent has the same one in all restarts of its workers.
    """
    own = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parents[2] if own and len(Path(own).parents) > 2 else None


def slurm_step(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the step that srun made for this process; None in a batch script or in salloc's shell."""
    step = environ.get("SLURM_STEP_ID", "")
    return step if step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP else None


def slurm_start(environ: Mapping[str, str] = os.environ) -> SlurmStart | None:
    """Return this process's place in its Slurm job, or None outside of one."""
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        return None
    cluster = environ.get("SLURM_CLUSTER_NAME", "")
    restart = _number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    return SlurmStart(f"{cluster}-{job}" if cluster else job, restart, slurm_step(environ) or "batch")


def job_end(environ: Mapping[str, str] = os.environ) -> float | None:
    """When the scheduler will end this job, in seconds since 1970 by its clock, or None where nothing says so."""
    try:
        return float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise AgreementError(
            f"{name}={environ.get(name)!r} is not a whole number; launchers set it, so look for the script that overwrites it."
        ) from None


def step_word(environ: Mapping[str, str] = os.environ) -> str:
    """A word that is the same in all processes that one command started, and hardly ever in others at that time."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    if "RANK" not in environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_MCA_orte_ess_jobid", "PMIX_NAMESPACE")
    said = "\0".join(environ.get(name, "") for name in names)
    return f"{zlib.crc32(said.encode()):08x}-"
