"""Which run a launch made: small files in the experiment's `.runmgr/launches/`.

============================  ==========================================================
`<key>.<n>`                   the run id of the nth start of a launch with a name
`slurm-<job>.<k>`             the kth training of a Slurm job (JSON): its run, restart, step and command
`slurm-<job>.<k>.restart-<r>`  who continues it after the job's rth requeue: empty, made exclusively
============================  ==========================================================

The name of a torchrun launch lies in the store of one of its agents. Each host's agent has it in a file too, since that
agent, and with it the store, may be lost while the launch goes on.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from runmgr import ranks
from runmgr.disk import atomic, record
from runmgr.disk.directory import check_name

if TYPE_CHECKING:
    from runmgr.disk.directory import Experiment, RunDirectory
    from runmgr.ranks import SlurmStart

_MOST_TRAININGS = 100_000  # of one Slurm job
_AGENT_FILE = "runmgr-launch"
_AGENT_FILE_CONTENT = re.compile("torchrun-[0-9a-f]{16}")


def remembered_by_agent() -> str | None:
    """Return the launch's name that an earlier start left with this host's torchrun agent. Any rank."""
    folder = ranks.torchrun_agent_folder()
    with suppress(OSError, UnicodeDecodeError):
        content = (folder / _AGENT_FILE).read_text() if folder is not None else ""
        return content if _AGENT_FILE_CONTENT.fullmatch(content) else None
    return None


def remember_by_agent(key: str | None) -> None:
    """Leave the launch's name with this host's torchrun agent. One rank of each host."""
    folder = ranks.torchrun_agent_folder()
    if folder is not None and key is not None and _AGENT_FILE_CONTENT.fullmatch(key):
        with suppress(OSError):  # a full disk: it is only missed if the agent that hosts the store is lost
            (folder / _AGENT_FILE).write_text(key)


class Launch(Protocol):
    """One way to know a launch again after its processes were started anew. All calls: rank 0 only."""

    key: str

    def run(self) -> RunDirectory | None:
        """Return the run that this launch has, if an earlier start of it left one."""

    def remember(self, run: RunDirectory) -> bool:
        """Note that `run` is this launch's; False when a rival start of the same launch noted another one first."""

    def give_back(self) -> None:
        """Undo what `run` took: this start failed."""


class NamedLaunch:
    """A launch that has a name: the user's RUNMGR_LAUNCH_ID, or the nonce in its torchrun agent's store.

    Several processes that start at once under one name are rivals: one of them makes the run, the others find it by
    the exclusive create and continue it, as they would have a moment later.
    """

    def __init__(self, experiment: Experiment, key: str, number: int) -> None:
        self.key = check_name(key, "launch id")
        self._experiment = experiment
        self._path = experiment.launches_path / f"{key}.{number}"
        self._found = self._noted = False

    def run(self) -> RunDirectory | None:
        """Return the run of this name, unless it was removed since."""
        try:
            run = self._experiment.run(self._path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._found = True
        return run if run.path.is_dir() else None

    def remember(self, run: RunDirectory) -> bool:
        """Give the name to `run`; an earlier run under it is only replaced if `run()` had seen it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = run.run_id.encode()
        try:
            if self._found:
                atomic.write_bytes(self._path, content)
            else:
                atomic.create_bytes(self._path, content)
        except FileExistsError:
            return False
        self._noted = True
        return True

    def give_back(self) -> None:
        """Forget the run, if this start noted it."""
        if self._noted:
            atomic.remove(self._path)
            self._noted = False


class SlurmLaunch:
    """A training in a Slurm job, known again after the job was requeued.

    Before the first requeue every start is a new training. After one, a start continues a training of the earlier
    restarts that nobody continued yet in this one: the one with the same command and step, else the same command
    (steps that srun makes at the same time may change numbers), else, where the command changed, the same step, or
    in a batch script the one that is next in order. Each is claimed by exclusive create, so no two continue one.
    """

    def __init__(self, experiment: Experiment, start: SlurmStart, command: list[str] | None = None) -> None:
        self.key = check_name(f"slurm-{start.job}", "Slurm job")
        self._experiment = experiment
        self._start = start
        words = sys.orig_argv if command is None else command
        self._command = hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()[:16]
        self._claimed: int | None = None
        self._noted: int | None = None

    def run(self) -> RunDirectory | None:
        """Claim and return the run of the training that this start continues."""
        if not self._start.restart:
            return None
        names = self._names()
        entries = {int(name): self._read(int(name)) for name in names if name.isdecimal()}
        restart = self._start.restart
        taken = {
            k for k, entry in entries.items() if entry.get("restart") == restart or f"{k}.restart-{restart}" in names
        }
        likeness = {k: self._likeness(k, entry, len(taken)) for k, entry in entries.items() if k not in taken}
        for number in sorted((k for k, rank in likeness.items() if rank), key=lambda k: (-likeness[k], k)):
            run = self._experiment.run(entries[number]["run_id"])
            if run.path.is_dir() and self._claim(number):
                return run
        return None

    def remember(self, run: RunDirectory) -> bool:
        """Note `run` as the job's next training."""
        if self._claimed is not None:
            return True
        self._experiment.launches_path.mkdir(parents=True, exist_ok=True)
        start = self._start
        entry = {"run_id": run.run_id, "restart": start.restart, "step": start.step, "command": self._command}
        for number in range(1, _MOST_TRAININGS):
            try:
                atomic.create_bytes(self._experiment.launches_path / f"{self.key}.{number}", atomic.dump_json(entry))
            except FileExistsError:
                continue
            self._noted = number
            return True
        return False

    def give_back(self) -> None:
        """Let another start continue what this one claimed, and forget the training that it noted."""
        if self._noted is not None:
            atomic.remove(self._experiment.launches_path / f"{self.key}.{self._noted}")
            self._noted = None
        if self._claimed is not None:
            atomic.remove(self._claim_path(self._claimed))
            self._claimed = None

    def _names(self) -> set[str]:
        """List this job's files, without what they have in common: a listing asks the file server, a look may not."""
        try:
            names = os.listdir(self._experiment.launches_path)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        prefix = f"{self.key}."
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    def _read(self, number: int) -> dict[str, Any]:
        return record.read_json(self._experiment.launches_path / f"{self.key}.{number}") or {}

    def _likeness(self, number: int, entry: dict[str, Any], taken: int) -> int:
        """Say how well an earlier training fits this start; 0: not at all."""
        if (
            not entry.get("run_id")
            or not isinstance(entry.get("restart"), int)
            or entry["restart"] > self._start.restart
        ):
            return 0
        same_step = entry.get("step") == self._start.step
        if entry.get("command") == self._command:
            return 3 if same_step else 2
        return int(same_step and (self._start.step != "batch" or number == taken + 1))

    def _claim(self, number: int) -> bool:
        try:
            atomic.create_bytes(self._claim_path(number), b"")
        except FileExistsError:
            return False
        self._claimed = number
        return True

    def _claim_path(self, number: int) -> Any:
        return self._experiment.launches_path / f"{self.key}.{number}.restart-{self._start.restart}"
