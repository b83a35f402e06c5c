"""run.json, the attempts' records, and the status that they and the lease add up to."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic
from runmgr.errors import RunBusy, RunError, RunNotFound, Superseded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from runmgr.disk.directory import RunDirectory

FORMAT = 1
STATUSES = ("running", "completed", "failed", "interrupted", "preempted")
REMOVING = "removing"  # what the newest attempt's record says while the run is being moved to the trash
LEASE_S = 30.0
_LOST_AFTER_S = 2 * LEASE_S
_MOST_TRIES = 10


def this_host() -> str:
    """Return this host's name."""
    import socket  # here, since a reading command seldom needs it

    return socket.gethostname()


def now_text() -> str:
    """Return the time in UTC, as ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None when there is none.

    Raises OSError when it could not be read: what decides or writes must not take that for an empty one.
    """
    try:
        value = json.loads(atomic.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def look_at_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, or nothing; for what only shows things, where one bad file must not hide the rest."""
    try:
        return read_json(path) or {}
    except OSError:
        return {}


def newer_format(run: RunDirectory, attempts: Sequence[Mapping[str, Any]] | None = None) -> str | None:
    """Say so of a run in which a later version wrote what this one would misread; no number means the first format.

    `attempts` are their records, where they have been read; else the newest is.
    """
    records = [look_at_json(run.record_path), *([newest_record(run)] if attempts is None else attempts)]
    numbers = [content.get("format") for content in records]
    newest = max((number for number in numbers if isinstance(number, int)), default=FORMAT)
    if newest <= FORMAT:
        return None
    return f"a newer runmgr wrote it (format {newest}, this one knows {FORMAT}); upgrade runmgr to use it"


def check_format(run: RunDirectory, attempts: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Raise RunError for a run that only a later version may judge or change; see `newer_format`."""
    why = newer_format(run, attempts)
    if why is not None:
        raise RunError(f"run {run.run_id} is not for this version: {why}", run_id=run.run_id, path=str(run.path))


def attempt_numbers(run: RunDirectory) -> list[int]:
    """Return the attempts that this run has had, in order; listings, so that the file server answers.

    One whose record was lost is known by the checkpoints it left, so that its number is never given out again.
    """
    found = {name[:-5] for name in _names_in(run.attempts_path) if name.endswith(".json")}
    found |= {name.partition("-")[0] for name in _names_in(run.objects_path)}
    return sorted({int(number) for number in found if number.isdecimal()} - {0})


def _names_in(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


class Attempt:
    """One start of the processes on a run; its own record, written by its rank 0 alone."""

    def __init__(self, run: RunDirectory, number: int, content: dict[str, Any]) -> None:
        self.run = run
        self.number = number
        self.content = content

    @classmethod
    def begin(cls, run: RunDirectory, facts: dict[str, Any], *, after: int | None = None) -> Attempt:
        """Take the next number by exclusive create; from then on every earlier attempt is superseded.

        Raises RunBusy if another process began an attempt since `after` was the newest: of several that judged the run
        free at the same moment, whatever their leases say, one goes on.

        `accepts` and `clock_offset_s` (how far the file server's clock is ahead of this host's) in the record are
        filled in next. `accepts` says up to which sequence number each earlier attempt is believed:
        what a late one adds after that is read by nobody.
        """
        number = (max(attempt_numbers(run), default=0) if after is None else after) + 1
        content = {
            "format": FORMAT,
            "attempt": number,
            "status": "running",
            "started": now_text(),
            "ended": None,
            "error": None,
            "host": this_host(),
            "pid": os.getpid(),
            "pid_namespace": _pid_namespace(),
            "accepts": None,
            **facts,
            "checkpoints": [],
        }
        for _ in range(_MOST_TRIES):
            try:
                atomic.create_bytes(run.attempt_path(number), atomic.dump_json(content))
            except FileExistsError:
                if max(attempt_numbers(run), default=0) >= number:
                    break  # else GlusterFS refused all rivals, as it seldom does
            else:
                content["clock_offset_s"] = atomic.clock_offset_s(run.attempts_path)
                return cls(run, number, content)
        raise busy(run, holder_of(run), 0.0) from None

    def write(self) -> None:
        """Replace the record on disk by the one in memory, durably."""
        try:
            atomic.write_json(self.run.attempt_path(self.number), self.content)
        except FileNotFoundError:  # a newer attempt swept the temporary away
            self.check_newest()
            raise

    def check_newest(self) -> None:
        """Raise Superseded when a newer attempt owns the run, RunNotFound when the run is in the trash or elsewhere."""
        numbers = attempt_numbers(self.run)
        if not numbers and not self.run.attempts_path.is_dir():
            raise gone(self.run)
        newest = max(numbers, default=self.number)
        if newest > self.number:
            raise Superseded(
                f"attempt {newest} has taken over run {self.run.run_id}; attempt {self.number} (this process, "
                f"{this_host()} pid {os.getpid()}) stops writing to it",
                run_id=self.run.run_id,
                attempt=self.number,
                newer=newest,
            )


class RunRecord:
    """run.json: small, replaced atomically, written by rank 0 of the newest attempt."""

    def __init__(self, run: RunDirectory, content: dict[str, Any]) -> None:
        self.run = run
        self.content = content

    @classmethod
    def read(cls, run: RunDirectory) -> RunRecord:
        """Read the record; a missing or damaged one is empty, and unknown fields of a later version are kept.

        Raises OSError when it is there and cannot be read.
        """
        return cls(run, read_json(run.record_path) or {})

    def update(self, **changes: Any) -> None:
        """Change fields and replace the file."""
        self.content.update(changes)
        atomic.write_json(self.run.record_path, self.content)


def write_end(
    attempt: Attempt, run_record: RunRecord, status: str, error: BaseException | None, seen: dict[str, Any]
) -> None:
    """Write down how an attempt ended, in its record and, unless a newer one has taken over, with `seen` in run.json."""
    ended: dict[str, Any] = {"status": status, "ended": now_text(), "error": None}
    if error is not None:
        ended["error"] = {"type": type(error).__name__, "message": text_of(error)}
    attempt.content.update(ended)
    attempt.write()
    attempt.check_newest()
    run_record.update(**ended, **seen)


def text_of(error: BaseException) -> str:
    """Return the text of anybody's error."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # a user's own __str__
        return f"<{type(error).__name__} that cannot be shown>"


def busy(run: RunDirectory, holder: str, age_s: float) -> RunBusy:
    """Return the error for a run that somebody else trains in, or is moving to the trash."""
    if newest_record(run).get("status") == REMOVING:
        return RunBusy(
            f"run {run.run_id} is being moved to the trash by {holder}", run_id=run.run_id, holder=holder, age_s=age_s
        )
    return RunBusy(
        f"run {run.run_id} is being trained by {holder}, seen alive {age_s:.0f} s ago. Wait for it to "
        f"end, stop it, or branch off with fork_from={run.run_id!r} (a new run from its checkpoint).",
        run_id=run.run_id,
        holder=holder,
        age_s=age_s,
    )


def gone(run: RunDirectory) -> RunNotFound:
    """Return the error for a run that was moved away while this process was busy with it."""
    experiment = run.experiment
    is_in_trash = (experiment.trash_path / run.run_id).is_dir()
    how = (
        f"`runmgr restore {experiment.name}/{run.run_id}` brings it back" if is_in_trash else "it was moved or removed"
    )
    return RunNotFound(
        f"run {run.run_id} is not in {experiment.path} any more{', but in its trash' * is_in_trash}: {how}",
        path=str(run.path),
    )


@contextmanager
def told_if_gone(run: RunDirectory) -> Iterator[None]:
    """Raise RunNotFound in place of what system calls say when the whole run was moved away."""
    try:
        yield
    except (FileNotFoundError, FileExistsError) as error:  # the second by a mkdir(exist_ok=True) that looked too late
        if isinstance(error, RunError) or is_there(run):
            raise
        raise gone(run) from error


def is_there(run: RunDirectory) -> bool:
    """Whether there is more in a run's directory than those make who look for its lease, or mark it, as it goes."""
    if set(_names_in(run.path)) - {run.private_path.name}:
        return True
    return bool({run.attempts_path.name, run.objects_path.name} & set(_names_in(run.private_path)))


def newest_record(run: RunDirectory) -> dict[str, Any]:
    """Return what the newest attempt says of itself; nothing when there is none or it cannot be read."""
    try:
        return look_at_json(run.attempt_path(max(attempt_numbers(run), default=0)))
    except OSError:  # not even a listing; the lease decides, this only names its holder
        return {}


def holder_of(run: RunDirectory) -> str:
    """Name the process that began the newest attempt."""
    record = newest_record(run)
    return f"pid {record.get('pid', '?')} on host {record.get('host', '?')} (attempt {record.get('attempt', '?')})"


def lease_age_s(run: RunDirectory) -> float | None:
    """Return how long ago the live writer's mark was refreshed, as far as clocks agree; None without a mark."""
    try:
        return max(0.0, time.time() - run.lease_path.stat().st_mtime)
    except OSError:
        return None


def status_of(run: RunDirectory, record: dict[str, Any]) -> str:
    """Return the run's status; `lost` (a hint) when it says running but its writer shows no sign of life."""
    status = record.get("status")
    if status != "running":
        return status if isinstance(status, str) else "unknown"
    age_s = lease_age_s(run)
    if age_s is None or age_s > _LOST_AFTER_S:
        return "lost"
    return "lost" if is_dead_here(newest_record(run)) else "running"


def is_dead_here(attempt: dict[str, Any]) -> bool:
    """Whether the process that began an attempt is gone for certain: it ran on this host, in our process namespace."""
    is_here = attempt.get("host") == this_host() and attempt.get("pid_namespace") == _pid_namespace()
    return is_here and not _is_alive(attempt.get("pid"))


def _pid_namespace() -> int | None:
    """Return what tells apart the containers of a host that share its name; process numbers mean nothing across them."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _is_alive(pid: object) -> bool:
    """Whether a process of this host runs, as far as can be known."""
    try:
        os.kill(int(str(pid)), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):  # not ours to ask
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: object) -> bool:
    """Whether a process of this host has ended and was not yet waited for; containers often keep such."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in {"Z", "X"}
    except (OSError, IndexError):
        return False
