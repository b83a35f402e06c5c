"""Every exception that runmgr raises on purpose.

::

    RunError
    ├── InvalidInput           an argument that cannot be used (also a ValueError)
    │   └── InvalidName        an experiment name, run id or tag that would leave its place
    ├── RunNotFound            no such experiment, run or checkpoint (also a FileNotFoundError)
    │   └── CheckpointNotFound
    ├── RunBusy                somebody else is training in this run right now
    ├── RunProtected           the run stays as long as something in it is pinned, or another run was forked from it
    ├── Superseded             a newer attempt has taken this run over; this process must stop writing
    ├── NotShared              a host does not see the directory that rank 0 made
    ├── CheckpointCorrupt      a checkpoint's bytes are not the ones that were saved
    └── AgreementError         the ranks could not come to one answer
        ├── RankFailed         a rank raised something else; every rank raises this in its place
        └── RankTimeout        a rank did not come in time

They pickle, and they cross between ranks as JSON: their fields hold plain data only.
"""

from __future__ import annotations

from typing import Any


class RunError(Exception):
    """The base of all. `message` says what was given, what it clashes with and what to do; fields repeat it as data."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    @property
    def message(self) -> str:
        """The text, as `str()` gives it."""
        return str(self.args[0])

    @property
    def fields(self) -> dict[str, Any]:
        """What the error was about, as plain data."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    @property
    def is_echo(self) -> bool:
        """Whether another rank raised it, and this process only repeats it."""
        return bool(self.__dict__.get("_is_echo"))

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (type(self).__name__, self.message, self.fields)


class InvalidInput(RunError, ValueError):
    """An argument that cannot be used. Nothing was created or changed."""


class InvalidName(InvalidInput):
    """A name that would leave its place on disk or break a line of output. Fields: `name`, `kind`."""

    name: str
    kind: str


class RunNotFound(RunError, FileNotFoundError):
    """No such experiment or run. Field: `path`."""

    path: str

    def __str__(self) -> str:
        return self.message


class CheckpointNotFound(RunNotFound):
    """The run has no such checkpoint. Field: `path`."""


class RunBusy(RunError):
    """Somebody else holds the run's lease. Fields: `run_id`, `holder` (host and pid), `age_s`."""

    run_id: str
    holder: str
    age_s: float


class RunProtected(RunError):
    """The run is not moved to the trash, for the reason given. Fields: `run_id`, `reason`."""

    run_id: str
    reason: str


class Superseded(RunError):
    """A newer attempt owns the run: this process may not publish any more. Fields: `run_id`, `attempt`, `newer`."""

    run_id: str
    attempt: int
    newer: int


class NotShared(RunError):
    """A host does not see rank 0's directory, so the file system is not shared. Fields: `host`, `path`."""

    host: str
    path: str


class CheckpointCorrupt(RunError):
    """A checkpoint does not hold what was saved. Fields: `path`, `reason`."""

    path: str
    reason: str


class AgreementError(RunError):
    """The ranks of a launch cannot speak with each other, or did not come to one answer."""


class RankFailed(AgreementError):
    """One rank raised; all ranks raise this. Fields: `rank`, `host`, `what`, `error_type`, `error`."""

    rank: int
    host: str
    what: str
    error_type: str
    error: str


class RankTimeout(AgreementError):
    """Some ranks did not come in time. Fields: `ranks`, `what`, `timeout_s`."""

    ranks: list[int]
    what: str
    timeout_s: float


def _tree(base: type[RunError]) -> dict[str, type[RunError]]:
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


def rebuild(name: str, message: str, fields: dict[str, Any]) -> RunError:
    """Make the error called `name` again from its plain parts; an unknown name gives a RunError."""
    return _tree(RunError).get(name, RunError)(message, **fields)


def echo(name: str, message: str, fields: dict[str, Any]) -> RunError:
    """Make the error that another rank raised."""
    return rebuild(name, message, fields | {"_is_echo": True})
