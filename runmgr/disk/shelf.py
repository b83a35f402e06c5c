"""The shelf: a run's checkpoints as the live attempt changes them. Commit, swing the names, keep what is to stay."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, integrity, record
from runmgr.disk.checkpoints import (
    Checkpoint,
    Mode,
    dropped,
    is_better,
    is_same_content,
    object_names,
    pinned_objects,
    ranked,
    read_all,
    without_names,
)
from runmgr.disk.directory import AVERAGE_NAME, BEST_NAME, LATEST_NAME
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path


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
        self._dropped: list[dict[str, Any]] = []
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
        if not self._synced:
            self.run.sync()
            self._synced = True
        checkpoint = dataclasses.replace(checkpoint, size_bytes=path.stat().st_size, digest=integrity.digest(path))
        checkpoint = dataclasses.replace(checkpoint, names=self._names_for(checkpoint))
        self.entries = [without_names(entry, set(checkpoint.names)) for entry in self.entries] + [checkpoint]
        leaving = self._to_drop()
        self.entries = [entry for entry in self.entries if entry not in leaving]
        self._commit(leaving, by=checkpoint.sequence)
        self.attempt.check_newest()
        for name in checkpoint.names:
            atomic.point_name(self.run.path / name, path)
        self.run_record.content["save_error"] = None
        self.run_record.update(latest=_summary(self.latest), best=_summary(self.best))  # syncs the names as well
        self._remove(leaving)
        manifest = {"format": record.FORMAT, "checkpoints": [entry.as_json() for entry in self.entries]}
        atomic.write_derived_json(self.run.manifest_path, manifest)
        return checkpoint

    def repair_names(self) -> None:
        """Point the public names at what the records say, after a predecessor died or woke up in between."""
        for entry in self.entries:
            for name in entry.names:
                path, public = entry.path_in(self.run), self.run.path / name
                if not is_same_content(path, public):
                    atomic.point_name(public, path)

    def sweep(self) -> None:
        """Remove what dead attempts left half-done: temporaries, objects that no record lists, and what they had dropped."""
        self._remove(dropped(self.run))
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

    def _commit(self, leaving: list[Checkpoint], *, by: int) -> None:
        """Write the record: what counts from now on, and what is about to be removed, should this process not get to it."""
        mine = {self.attempt.number} | ({0} if self.attempt.number == 1 else set())
        others = [
            entry for entry in self._dropped if entry["attempt"] not in mine
        ]  # their own records still list these
        self._dropped = others + [entry.as_json() | {"by": by} for entry in leaving]
        self.attempt.content["checkpoints"] = [entry.as_json() for entry in self.entries if entry.attempt in mine]
        self.attempt.content["dropped"] = self._dropped
        self.attempt.write()

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
        pinned = pinned_objects(self.run)
        stay += [entry for entry in self.entries if entry.object_name in pinned]
        orders = {entry.order for entry in stay}
        members = {name for entry in stay for name in entry.members}
        return [entry for entry in self.entries if entry.order not in orders and entry.object_name not in members]

    def _remove(self, leaving: list[Checkpoint]) -> None:
        taken = {name for entry in self.entries for name in entry.names}
        for entry in leaving:
            for name in entry.names:
                if name not in taken:
                    atomic.remove(self.run.path / name)
            atomic.remove(entry.path_in(self.run))


def _summary(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    content = checkpoint.as_json()
    return {name: content[name] for name in ("attempt", "sequence", "epoch", "step", "metrics", "size_bytes", "saved")}
