"""The shelf: a run's checkpoints as the live attempt changes them. Commit, swing the names, keep what is to stay."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, integrity, record
from runmgr.disk.checkpoints import (
    Checkpoint,
    Mode,
    is_same_content,
    object_names,
    ranked,
    read_books,
    recorded,
    with_names,
)
from runmgr.disk.directory import AVERAGE_NAME, BEST_NAME, EPOCH_PREFIX, LATEST_NAME
from runmgr.disk.metrics import is_better
from runmgr.disk.pins import pinned_objects
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay. Latest, best, members of an average and pinned ones always do.

    last            so many of the newest; 0 keeps only those that always stay, None all
    best            so many of the best by the run's `monitor`
    epochs          those of certain epochs, by the number of finished ones: (10, 20)
    every_n_epochs  every so many epochs
    every_n_steps   every so many steps, of those that are saved
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
            if value is not None and not _is_count(value, least):
                raise InvalidInput(
                    f"Keep({name}={value!r}): give a whole number, at least {least}"
                    + ("; None keeps all" if name == "last" else "")
                )
        given: object = self.epochs
        epochs = tuple(given) if isinstance(given, Iterable) else None
        if epochs is None or not all(_is_count(epoch, 0) for epoch in epochs):
            raise InvalidInput(f"Keep(epochs={given!r}): give whole numbers of finished epochs, such as (10, 20)")
        object.__setattr__(self, "epochs", epochs)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Shelf:
    """A run's checkpoints as the live attempt sees and changes them. Rank 0 only.

    `held` names the objects that averages in memory are made of, which stay as well: replace the set, don't change it,
    since a background save reads it. `damaged` names those that a restore rejected.
    """

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
        self.held: AbstractSet[str] = frozenset()
        books = read_books(self.run)
        self.damaged = books.damaged
        self.entries = self._with_names(entry for entry in books.entries if entry.object_name in books.present)
        self._epoch: int | None = None  # the last one that training is known to have finished
        self._leaving = books.dropped  # to be removed once nothing on disk says that it counts
        self._dropped: dict[tuple[int, int], dict[str, Any]] = {}
        self._to_point: frozenset[str] = frozenset()  # names whose owner changed since all names were right
        self._sequence = 0
        self._synced = False

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those to resume from, oldest first, damaged ones included."""
        return [entry for entry in self.entries if entry.kind == "checkpoint"]

    @property
    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; a damaged one only if there is no other."""
        return self.named(LATEST_NAME)

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint by the monitored metric."""
        return next(iter(self._ranked(self.entries)), None)

    def named(self, name: str) -> Checkpoint | None:
        """Return the entry that owns a public name."""
        return next((entry for entry in self.entries if name in entry.names), None)

    def next(self, **facts: Any) -> Checkpoint:
        """Return the next checkpoint to be written, not yet committed; raises Superseded."""
        self.attempt.check_newest()
        self._sequence += 1
        return Checkpoint(attempt=self.attempt.number, sequence=self._sequence, saved=record.now_text(), **facts)

    def adopt(self, source: Path, others: Sequence[Path] = (), **facts: Any) -> Checkpoint:
        """Bring another run's file, and the `others` that its averages are made of, into this one: the start of a fork.

        All of it is linked where possible, durable before the commit, and counts at once. What somebody may write to, as
        other programs' files, is copied: through a link they would change it here too.
        """
        saved = record.now_text()
        adopted = Checkpoint(attempt=0, sequence=1, saved=saved, **facts)
        members = [
            Checkpoint(attempt=0, sequence=number, kind="member", saved=saved)
            for number, _ in enumerate(others, start=2)
        ]
        for entry, path in zip([adopted, *members], [source, *others], strict=True):
            if path.stat().st_mode & 0o222:
                atomic.copy(path, entry.path_in(self.run))
            else:
                atomic.point_name(entry.path_in(self.run), path)
        atomic.sync_directory(self.run.objects_path)
        self.entries += [self._measured(entry) for entry in members]
        return self.publish(adopted)

    def publish(self, checkpoint: Checkpoint) -> Checkpoint:
        """Commit an object that lies on disk, swing the public names to it, then drop what need not stay.

        Up to the commit nothing changed for anybody; after it the new checkpoint is found, whatever happens. What an
        error left undone behind the commit is done by the next publish.
        """
        try:
            if not self._synced:
                self.run.sync()
                self._synced = True
            checkpoint = self._claiming(self._measured(checkpoint))
            entries = self._with_names([*self.entries, checkpoint])
            leaving = self._to_drop(entries)
            self._commit([entry for entry in entries if entry not in leaving], leaving, checkpoint)
        except BaseException:
            self._take_back(checkpoint)
            raise
        self.attempt.check_newest()
        self.run_record.content["save_error"] = None
        self._to_point |= self._swung()
        self._point_names()
        self._remove_leaving()
        manifest = {"format": record.FORMAT, "checkpoints": [entry.as_json() for entry in self.entries]}
        atomic.write_derived_json(self.run.manifest_path, manifest)
        return next((entry for entry in self.entries if entry.order == checkpoint.order), checkpoint)

    def reject(self, checkpoint: Checkpoint, problem: str) -> None:
        """Write down that a checkpoint is damaged. Its public names go to the next best; it stays until it is replaced."""
        texts = dict.fromkeys([*self.attempt.content.get("rejected", []), problem])
        self._set_damaged(self.damaged | {checkpoint.object_name}, rejected=list(texts))

    def continue_from(self, path: Path) -> None:
        """Take note of the file that training goes on from, which was found whole."""
        found = self._lying_at(path)
        self._epoch = None if found is None else found.epoch
        if found is not None and path.name in self.damaged:
            self._set_damaged(self.damaged - {path.name})

    def logged_by(self, path: Path) -> int | None:
        """Return the greatest step in TensorBoard's events when a checkpoint was saved; None if that is not known."""
        found = self._lying_at(path)
        return None if found is None else found.logged

    def _lying_at(self, path: Path) -> Checkpoint | None:
        return next((entry for entry in self.checkpoints if entry.path_in(self.run) == path), None)

    def repair_names(self) -> None:
        """Point the public names at what the records say, after a predecessor died or woke up in between."""
        for entry in self.entries:
            for name in entry.names:
                path, public = entry.path_in(self.run), self.run.path / name
                if not is_same_content(path, public):
                    atomic.point_name(public, path)

    def sweep(self) -> None:
        """Remove what dead attempts left half-done: temporaries, objects that no record lists, and what they had dropped."""
        self._remove_leaving()
        unlisted = set(object_names(self.run)) - {entry.object_name for entry in self.entries}
        for directory in (
            self.run.path,
            self.run.private_path,
            self.run.objects_path,
            self.run.attempts_path,
            self.run.failures_path,
        ):
            for name in os.listdir(directory) if directory.is_dir() else ():  # most runs have no failures
                if atomic.TEMPORARY in name or (directory == self.run.objects_path and name in unlisted):
                    atomic.remove(directory / name)

    def _commit(self, entries: list[Checkpoint], leaving: list[Checkpoint], checkpoint: Checkpoint) -> None:
        """Write the record: what counts from now on, and what is about to be removed, should this process not get to it."""
        content, epoch = self.attempt.content, self._epoch if checkpoint.epoch is None else checkpoint.epoch
        mine = {self.attempt.number} | ({0} if self.attempt.number == 1 else set())
        leaving = self._leaving + leaving
        unfinished = {entry.order for entry in leaving}
        dropped = {  # others' own records still list theirs
            order: entry
            for order, entry in self._dropped.items()
            if entry["attempt"] not in mine or order in unfinished
        }
        for entry in leaving:
            dropped.setdefault(entry.order, entry.as_json() | {"by": checkpoint.sequence})
        listed = [entry.as_json() for entry in entries if entry.attempt in mine]
        to_point = self._to_point | _moved(self.entries, entries)
        try:
            self.attempt.content = content | {"checkpoints": listed, "dropped": list(dropped.values())}
            self.attempt.write()
        except BaseException:
            self.attempt.content = content
            raise
        # one statement without a call, so that Ctrl-C comes before all of it or after
        self._leaving, self._dropped, self._to_point, self._epoch, self.entries = (
            leaving,
            dropped,
            to_point,
            epoch,
            entries,
        )

    def _take_back(self, checkpoint: Checkpoint) -> None:
        """Forget an object whose commit failed.

        Its record may be on disk all the same, when only the sync behind the rename failed. Then the object stays until
        the next commit has replaced that record.
        """
        if any(entry.order == checkpoint.order for entry in self.entries):  # Ctrl-C right behind the commit
            return
        self._leaving = [*self._leaving, checkpoint]
        with suppress(OSError):  # the error that brought us here is the one to tell; the next publish tries again
            if all(entry.order != checkpoint.order for entry in recorded(self.run, self.attempt.number)):
                atomic.remove(checkpoint.path_in(self.run))
                self._leaving = self._leaving[:-1]

    def _set_damaged(self, damaged: frozenset[str], **changes: Any) -> None:
        self.attempt.content.update(changes, damaged=sorted(damaged))
        self.attempt.write()
        before, self.damaged = self.entries, damaged
        self.entries = self._with_names(before)
        self._to_point |= _moved(before, self.entries)
        if self._to_point:
            self.attempt.check_newest()
            self._point_names()

    def _measured(self, checkpoint: Checkpoint) -> Checkpoint:
        path = checkpoint.path_in(self.run)
        return dataclasses.replace(checkpoint, size_bytes=path.stat().st_size, digest=integrity.digest(path))

    def _with_names(self, entries: Iterable[Checkpoint]) -> list[Checkpoint]:
        ordered = sorted(entries, key=lambda entry: entry.order)
        return with_names(ordered, self.damaged, self.monitor, self.mode)

    def _ranked(self, entries: Iterable[Checkpoint]) -> list[Checkpoint]:
        return ranked((entry for entry in entries if entry.object_name not in self.damaged), self.monitor, self.mode)

    def _claiming(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the new checkpoint with the public name that is its own, if it gets one."""
        if checkpoint.kind != "checkpoint":
            return dataclasses.replace(checkpoint, names=(AVERAGE_NAME,) if checkpoint.kind == "average" else ())
        named = dataclasses.replace(checkpoint, names=(self._own_name(checkpoint),))
        several = self.keep.last is None or self.keep.last > 1
        is_among_best = self.keep.best > 1 and named in self._ranked([*self.entries, named])[: self.keep.best]
        return named if several or is_among_best or self._is_kept_by_number(named) else checkpoint

    def _own_name(self, checkpoint: Checkpoint) -> str:
        """Return a name by epoch, or by step where training had already saved that epoch and is now in the next.

        Only what this training went through counts: another line, which a restore left, may have had other steps.
        """
        epoch, step = checkpoint.epoch, checkpoint.step
        if epoch is not None and epoch != self._epoch:
            return _epoch_name(epoch)
        return f"ckpt_step_{step}.pth" if step is not None else f"ckpt_after_epoch_{epoch}_{checkpoint.object_name}"

    def _is_kept_by_number(self, entry: Checkpoint) -> bool:
        """Whether `keep` gives a number of an entry that has a name of its own."""
        keep, epoch, step = self.keep, entry.epoch, entry.step
        if not set(entry.names) - {LATEST_NAME, BEST_NAME}:
            return False
        if step and keep.every_n_steps and step % keep.every_n_steps == 0:
            return True
        by_epoch = epoch in keep.epochs or bool(epoch and keep.every_n_epochs and epoch % keep.every_n_epochs == 0)
        return by_epoch and epoch is not None and _epoch_name(epoch) in entry.names

    def _to_drop(self, entries: list[Checkpoint]) -> list[Checkpoint]:
        """Apply `keep`. Only what this run recorded is ever on the list."""
        checkpoints = [entry for entry in entries if entry.kind == "checkpoint"]
        whole = [entry for entry in checkpoints if entry.object_name not in self.damaged]
        stay = checkpoints if self.keep.last is None else whole[-max(self.keep.last, 1) :]
        stay = stay + self._ranked(checkpoints)[: max(self.keep.best, 1)] + self._not_replaced(checkpoints, whole)
        stay += [entry for entry in checkpoints if self._is_kept_by_number(entry)]
        stay += [entry for entry in entries if entry.kind == "average"][-1:]
        pinned = pinned_objects(self.run)
        stay += [entry for entry in entries if entry.object_name in pinned]
        orders = {entry.order for entry in stay}
        members = {name for entry in stay for name in entry.members} | self.held
        return [entry for entry in entries if entry.order not in orders and entry.object_name not in members]

    def _not_replaced(self, checkpoints: list[Checkpoint], whole: list[Checkpoint]) -> list[Checkpoint]:
        """Return the damaged ones that nothing as new, or nothing as good, has replaced."""
        damaged = [entry for entry in checkpoints if entry.object_name in self.damaged]
        newest = max((entry.order for entry in whole), default=(0, 0))
        best = self._ranked(whole)[max(self.keep.best, 1) - 1 :][:1]  # the last one that is kept for being good
        bar = next((entry.metrics[str(self.monitor)] for entry in best), None)
        better = [
            entry
            for entry in ranked(damaged, self.monitor, self.mode)
            if is_better(entry.metrics[str(self.monitor)], bar, self.mode)
        ]
        return [entry for entry in damaged if entry.order > newest] + better

    def _remove_leaving(self) -> None:
        taken = _owners(self.entries)
        for entry in self._leaving:
            for name in entry.names:
                if name not in taken:
                    atomic.remove(self.run.path / name)
            atomic.remove(entry.path_in(self.run))
        self._leaving = []

    def _swung(self) -> frozenset[str]:
        """Return the names that a superseded attempt moved or removed when it woke up. Two listings clear most of them."""
        if self.attempt.number == 1:
            return frozenset()
        public, objects = _inodes(self.run.path), _inodes(self.run.objects_path)
        return frozenset(
            name
            for entry in self.entries
            for name in entry.names
            if public.get(name) != objects.get(entry.object_name)
            and not is_same_content(entry.path_in(self.run), self.run.path / name)
        )

    def _point_names(self) -> None:
        """Swing every name whose owner changed, and tell run.json, which makes them durable as well."""
        for entry in self.entries:
            for name in entry.names:
                if name in self._to_point:
                    atomic.point_name(self.run.path / name, entry.path_in(self.run))
        self.run_record.update(latest=_summary(self.latest), best=_summary(self.best))
        self._to_point = frozenset()


def _owners(entries: list[Checkpoint]) -> dict[str, tuple[int, int]]:
    return {name: entry.order for entry in entries for name in entry.names}


def _moved(before: list[Checkpoint], after: list[Checkpoint]) -> frozenset[str]:
    """Return the public names that have an owner now and had another one, or none."""
    return frozenset(name for name, _ in _owners(after).items() - _owners(before).items())


def _inodes(directory: Path) -> dict[str, int]:
    with os.scandir(directory) as found:
        return {entry.name: entry.inode() for entry in found}


def _epoch_name(epoch: int) -> str:
    return f"{EPOCH_PREFIX}{epoch}.pth"


def _summary(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    content = checkpoint.as_json()
    return {name: content[name] for name in ("attempt", "sequence", "epoch", "step", "metrics", "size_bytes", "saved")}
