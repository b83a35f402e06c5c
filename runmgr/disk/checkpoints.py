"""Checkpoint objects, their public names, which is latest and best, what is kept, and whether the bytes are right.

An object is `.runmgr/checkpoints/<attempt>-<sequence>.pth`. It counts once its attempt's record lists it; the public
names (`ckpt_latest.pth`, …) are further hard links to it. Order is (attempt, sequence), never mtime, never text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runmgr.disk import atomic, record
from runmgr.disk.directory import AVERAGE_NAME, BEST_NAME, LATEST_NAME, RunDirectory
from runmgr.errors import CheckpointCorrupt, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Mode = Literal["max", "min"]
_OBJECT_NAME = re.compile(r"(\d{4,})-(\d{6,})\.pth")
_READ_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint, as its attempt's record lists it. Sizes in bytes; `epoch` counts finished epochs.

    `members` are the objects that the averages in it are made of; after a fork they lie under other names than the
    file itself says, and `renamed` translates. Attempt 0 stands for what a fork brought along.
    """

    attempt: int
    sequence: int
    epoch: int | None = None
    step: int | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    size_bytes: int = 0
    digest: str = ""
    names: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    kind: Literal["checkpoint", "average", "member"] = "checkpoint"
    saved: str = ""

    @property
    def object_name(self) -> str:
        """The object's name, without its directory."""
        return f"{self.attempt:04d}-{self.sequence:06d}.pth"

    @property
    def order(self) -> tuple[int, int]:
        """What newer means."""
        return self.attempt, self.sequence

    def path_in(self, run: RunDirectory) -> Path:
        """Return where the object lies."""
        return run.objects_path / self.object_name

    def as_json(self) -> dict[str, Any]:
        """Return what the record holds; non-finite metrics as strings, since JSON has none."""
        content = dataclasses.asdict(self)
        content["metrics"] = {
            name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()
        }
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Checkpoint:
        """Read what `as_json` wrote; fields of a later version are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        values["metrics"] = {name: float(value) for name, value in values.get("metrics", {}).items()}
        for name in ("names", "members"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay: the `last` newest, the `best` best, and epochs or steps by number.

    Latest, best, members of an average and pinned ones always stay: `last=0` keeps only those, `last=None` all.
    """

    last: int | None = 1
    best: int = 1
    epochs: tuple[int, ...] = ()
    every_n_epochs: int | None = None
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, least in (("last", 0), ("best", 0), ("every_n_epochs", 1), ("every_n_steps", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InvalidInput(
                    f"Keep({name}={value!r}): give a whole number, at least {least}"
                    + ("; None keeps all" if name == "last" else "")
                )
        object.__setattr__(self, "epochs", tuple(self.epochs))


def is_better(new: float | None, old: float | None, mode: Mode) -> bool:
    """Whether `new` beats `old`. Ties keep the old one; what is missing or not finite never wins."""
    if new is None or not math.isfinite(new):
        return False
    if old is None or not math.isfinite(old):
        return True
    return new > old if mode == "max" else new < old


def ranked(checkpoints: Iterable[Checkpoint], monitor: str | None, mode: Mode) -> list[Checkpoint]:
    """Return the checkpoints with a finite `monitor` metric, best first, among equals the older first."""
    if monitor is None:
        return []
    sign = -1 if mode == "max" else 1
    scored = [
        (sign * value, checkpoint.order, checkpoint)
        for checkpoint in checkpoints
        if checkpoint.kind == "checkpoint"
        and (value := checkpoint.metrics.get(monitor)) is not None
        and math.isfinite(value)
    ]
    return [checkpoint for _, _, checkpoint in sorted(scored, key=lambda item: item[:2])]


def read_all(run: RunDirectory) -> list[Checkpoint]:
    """Return the run's committed checkpoints whose objects are there, oldest first.

    The newest attempt's record says up to which sequence number its predecessors are believed, and a public name
    belongs to the newest checkpoint that claims it.
    """
    numbers = record.attempt_numbers(run)
    accepts = (record.read_json(run.attempt_path(numbers[-1])) or {}).get("accepts") if numbers else None
    present = set(object_names(run))
    found: dict[tuple[int, int], Checkpoint] = {}
    for number in numbers:
        limit = math.inf if number == numbers[-1] or accepts is None else accepts.get(str(number), 0)
        for checkpoint in _recorded(run, number):
            if checkpoint.object_name in present and (checkpoint.attempt == 0 or checkpoint.sequence <= limit):
                found[checkpoint.order] = checkpoint
    taken: set[str] = set()
    result = []
    for _, checkpoint in sorted(found.items(), reverse=True):
        result.append(_without_names(checkpoint, taken))
        taken |= set(checkpoint.names)
    return result[::-1]


def accept_predecessors(attempt: record.Attempt) -> None:
    """Write down how far the earlier attempts are believed: as far as they had come when this one had its number.

    A predecessor looks for a newer attempt after each commit and before it reports the save as done, so every save
    that was reported is accepted here.
    """
    earlier = [number for number in record.attempt_numbers(attempt.run) if number < attempt.number]
    attempt.content["accepts"] = {
        str(number): max((entry.sequence for entry in _recorded(attempt.run, number) if entry.attempt), default=0)
        for number in earlier
    }
    attempt.write()


def _recorded(run: RunDirectory, attempt: int) -> list[Checkpoint]:
    content = record.read_json(run.attempt_path(attempt)) or {}
    return [Checkpoint.from_json(entry) for entry in content.get("checkpoints", [])]


def object_names(run: RunDirectory) -> Iterator[str]:
    """Yield the names of the checkpoint objects, committed or not."""
    try:
        names = os.listdir(run.objects_path)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (name for name in names if _OBJECT_NAME.fullmatch(name))


class Shelf:
    """A run's checkpoints as the live attempt sees and changes them. Rank 0 only."""

    def __init__(
        self,
        attempt: record.Attempt,
        run_record: record.RunRecord,
        *,
        monitor: str | None,
        mode: Mode,
        keep: Keep,
    ) -> None:
        self.run = attempt.run
        self.attempt = attempt
        self.run_record = run_record
        self.monitor = monitor
        self.mode: Mode = mode
        self.keep = keep
        self.entries = read_all(self.run)
        self._sequence = 0
        self._synced = False

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those to resume from, oldest first."""
        return [entry for entry in self.entries if entry.kind == "checkpoint"]

    @property
    def latest(self) -> Checkpoint | None:
        """The newest checkpoint."""
        return max(self.checkpoints, key=lambda entry: entry.order, default=None)

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint by the monitored metric."""
        return next(iter(ranked(self.entries, self.monitor, self.mode)), None)

    def named(self, name: str) -> Checkpoint | None:
        """Return the entry that owns a public name."""
        return next((entry for entry in self.entries if name in entry.names), None)

    def next(self, **facts: Any) -> Checkpoint:
        """Return the next checkpoint to be written, not yet committed; raises Superseded."""
        self.attempt.check_newest()
        if not self._synced:
            self.run.sync()
            self._synced = True
        self._sequence += 1
        return Checkpoint(attempt=self.attempt.number, sequence=self._sequence, saved=record.now_text(), **facts)

    def adopt(self, source: Path, *, sequence: int, **facts: Any) -> Checkpoint:
        """Bring another run's file into this one, as a link where possible: the start of a fork."""
        checkpoint = Checkpoint(attempt=0, sequence=sequence, saved=record.now_text(), **facts)
        atomic.point_name(checkpoint.path_in(self.run), source)
        return self.publish(checkpoint)

    def publish(self, checkpoint: Checkpoint) -> Checkpoint:
        """Commit an object that lies on disk, swing the public names to it, then drop what need not stay.

        Up to the commit nothing changed for anybody; after it the new checkpoint is found, whatever happens.
        """
        path = checkpoint.path_in(self.run)
        checkpoint = dataclasses.replace(checkpoint, size_bytes=path.stat().st_size, digest=digest(path))
        checkpoint = dataclasses.replace(checkpoint, names=self._names_for(checkpoint))
        entries = [_without_names(entry, set(checkpoint.names)) for entry in self.entries] + [checkpoint]
        self._commit(entries)
        self.attempt.check_newest()
        for name in checkpoint.names:
            atomic.point_name(self.run.path / name, path)
        self.run_record.update(latest=_summary(self.latest), best=_summary(self.best))  # syncs the names as well
        self._retain()
        manifest = {"format": record.FORMAT, "checkpoints": [entry.as_json() for entry in self.entries]}
        atomic.write_derived_json(self.run.manifest_path, manifest)
        return checkpoint

    def repair_names(self) -> None:
        """Point the public names at what the records say, after a predecessor died or woke up in between."""
        for entry in self.entries:
            for name in entry.names:
                path, public = entry.path_in(self.run), self.run.path / name
                if not _is_same_content(path, public):
                    atomic.point_name(public, path)

    def sweep(self) -> None:
        """Remove what dead attempts left half-done: temporaries, and objects that no record lists."""
        unlisted = set(object_names(self.run)) - {entry.object_name for entry in self.entries}
        for directory in (
            self.run.path,
            self.run.private_path,
            self.run.objects_path,
            self.run.attempts_path,
        ):
            for name in os.listdir(directory):
                if atomic.TEMPORARY in name or (directory == self.run.objects_path and name in unlisted):
                    atomic.remove(directory / name)

    def _commit(self, entries: list[Checkpoint]) -> None:
        mine = {self.attempt.number} | ({0} if self.attempt.number == 1 else set())
        self.attempt.content["checkpoints"] = [entry.as_json() for entry in entries if entry.attempt in mine]
        self.attempt.write()
        self.entries = entries

    def _names_for(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        if checkpoint.kind != "checkpoint":
            return (AVERAGE_NAME,) if checkpoint.kind == "average" else ()
        best, names = self.best, [LATEST_NAME]
        if self.monitor is not None and is_better(
            checkpoint.metrics.get(self.monitor), best.metrics[self.monitor] if best else None, self.mode
        ):
            names.append(BEST_NAME)
        several = self.keep.last is None or self.keep.last > 1
        if several or self._is_kept_by_number(checkpoint) or (self.keep.best > 1 and self._is_among_best(checkpoint)):
            names.append(self._own_name(checkpoint))
        return tuple(names)

    def _is_mid_epoch(self, checkpoint: Checkpoint) -> bool:
        """Whether its epoch had a checkpoint at an earlier step, so that this one belongs to the epoch after."""
        return any(
            entry.epoch == checkpoint.epoch and (entry.step or 0) < (checkpoint.step or 0) for entry in self.checkpoints
        )

    def _is_kept_by_number(self, checkpoint: Checkpoint) -> bool:
        keep, epoch, step = self.keep, checkpoint.epoch, checkpoint.step
        if step and keep.every_n_steps and step % keep.every_n_steps == 0:
            return True
        by_epoch = epoch in keep.epochs or bool(epoch and keep.every_n_epochs and epoch % keep.every_n_epochs == 0)
        return by_epoch and not self._is_mid_epoch(checkpoint)

    def _is_among_best(self, checkpoint: Checkpoint) -> bool:
        return checkpoint in ranked([*self.entries, checkpoint], self.monitor, self.mode)[: self.keep.best]

    def _own_name(self, checkpoint: Checkpoint) -> str:
        if checkpoint.epoch is None or self._is_mid_epoch(checkpoint):
            return f"ckpt_step_{checkpoint.step}.pth"
        return f"ckpt_epoch_{checkpoint.epoch}.pth"

    def _to_drop(self) -> list[Checkpoint]:
        """Apply `keep`. Only what this run recorded is ever on the list."""
        checkpoints, last = self.checkpoints, self.keep.last
        stay = list(checkpoints if last is None else checkpoints[len(checkpoints) - max(last, 1) :])
        stay += ranked(checkpoints, self.monitor, self.mode)[: max(self.keep.best, 1)]
        stay += [
            entry
            for entry in checkpoints
            if set(entry.names) - {LATEST_NAME, BEST_NAME} and self._is_kept_by_number(entry)
        ]
        stay += [entry for entry in self.entries if entry.kind == "average"][-1:]
        orders = {entry.order for entry in stay}
        members = {name for entry in stay for name in entry.members}
        return [entry for entry in self.entries if entry.order not in orders and entry.object_name not in members]

    def _retain(self) -> None:
        dropped = self._to_drop()
        for entry in dropped:
            for name in entry.names:
                atomic.remove(self.run.path / name)
            atomic.remove(entry.path_in(self.run))
        self.entries = [entry for entry in self.entries if entry not in dropped]


def _summary(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    content = checkpoint.as_json()
    return {name: content[name] for name in ("attempt", "sequence", "epoch", "step", "metrics", "size_bytes", "saved")}


def _without_names(entry: Checkpoint, names: set[str]) -> Checkpoint:
    return dataclasses.replace(entry, names=tuple(name for name in entry.names if name not in names))


def _is_same_content(path: Path, public: Path) -> bool:
    try:
        return path.samefile(public) or digest(path) == digest(public)
    except (OSError, CheckpointCorrupt):
        return False


def digest(path: Path) -> str:
    """Return the SHA-256 of the file's central directory, which holds a CRC-32 for each record before it."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            file.seek(archive.start_dir)
            return hashlib.sha256(file.read()).hexdigest()
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise CheckpointCorrupt(
            f"{path} is not a whole checkpoint: {error}", path=str(path), reason=str(error)
        ) from error


def verify(run: RunDirectory, checkpoint: Checkpoint) -> None:
    """Read the object through and raise CheckpointCorrupt, or OSError, unless it holds what was saved. Without torch."""
    path = checkpoint.path_in(run)
    reason = None
    if (size := path.stat().st_size) != checkpoint.size_bytes:
        reason = f"it has {size} bytes, saved were {checkpoint.size_bytes}"
    elif digest(path) != checkpoint.digest:
        reason = "its table of contents is not the one that was saved"
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as file:
                        while file.read(_READ_CHUNK_BYTES):
                            pass
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            reason = str(error)
    if reason:
        raise CheckpointCorrupt(f"{path} is damaged: {reason}", path=str(path), reason=reason)
