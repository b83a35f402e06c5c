"""Checkpoint objects and what is known of them: records, order, which is better, pins, whether the bytes are right.

An object is `.runmgr/checkpoints/<attempt>-<sequence>.pth`. It counts once its attempt's record lists it; the public
names (`ckpt_latest.pth`, …) are further hard links to it. Order is (attempt, sequence), never mtime, never text.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runmgr.disk import atomic, integrity, record
from runmgr.errors import CheckpointCorrupt, CheckpointNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from runmgr.disk.directory import RunDirectory

Mode = Literal["max", "min"]
_OBJECT_NAME = re.compile(r"(\d{4,})-(\d{6,})\.pth")


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
    """Return the run's committed checkpoints whose objects are there, oldest first."""
    present = set(object_names(run))
    return _owning_names([checkpoint for checkpoint in _committed(run) if checkpoint.object_name in present])


def listed(run: RunDirectory) -> list[Checkpoint]:
    """Return what `read_all` does, and those whose objects ought to be there and are not."""
    return _owning_names(_committed(run))


def _committed(run: RunDirectory) -> list[Checkpoint]:
    return _read_records(run)[0]


def dropped(run: RunDirectory) -> list[Checkpoint]:
    """Return what retention decided to remove, which a kill may have left on disk."""
    return _read_records(run)[1]


def _read_records(run: RunDirectory) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """Return what the records list, oldest first, and what retention took from that.

    The newest attempt's record says up to which sequence number its predecessors are believed, in what they added and
    in what they dropped.
    """
    numbers = record.attempt_numbers(run)
    accepts = (record.read_json(run.attempt_path(numbers[-1])) or {}).get("accepts") if numbers else None
    found: dict[tuple[int, int], Checkpoint] = {}
    gone: dict[tuple[int, int], Checkpoint] = {}
    for number in numbers:
        limit = math.inf if number == numbers[-1] or accepts is None else accepts.get(str(number), 0)
        removals = _dropped_by(run, number)
        not_believed = [entry for entry, by in removals if by > limit]
        for checkpoint in [*_recorded(run, number), *not_believed]:
            if checkpoint.attempt < number or checkpoint.sequence <= limit:
                found[checkpoint.order] = checkpoint
        gone |= {entry.order: entry for entry, by in removals if by <= limit}
    return [found[order] for order in sorted(found.keys() - gone.keys())], list(gone.values())


def _dropped_by(run: RunDirectory, attempt: int) -> list[tuple[Checkpoint, int]]:
    """Return what an attempt dropped, each with the sequence number of the save that did it."""
    content = record.read_json(run.attempt_path(attempt)) or {}
    try:
        return [(Checkpoint.from_json(entry), int(entry["by"])) for entry in content.get("dropped", [])]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _owning_names(entries: list[Checkpoint]) -> list[Checkpoint]:
    """Leave each public name to the newest checkpoint that claims it."""
    taken: set[str] = set()
    result = []
    for checkpoint in reversed(entries):
        result.append(without_names(checkpoint, taken))
        taken |= set(checkpoint.names)
    return result[::-1]


def accept_predecessors(attempt: record.Attempt) -> None:
    """Write down how far the earlier attempts are believed: as far as they had come when this one had its number.

    A predecessor looks for a newer attempt after each commit and before it reports the save as done, so every save
    that was reported is accepted here.
    """
    earlier = [number for number in record.attempt_numbers(attempt.run) if number < attempt.number]
    attempt.content["accepts"] = {}
    for number in earlier:
        entries = _recorded(attempt.run, number)
        last = max((entry.sequence for entry in entries if entry.attempt), default=0)
        attempt.content["accepts"][str(number)] = last
        if entries and "checkpoints" not in (record.read_json(attempt.run.attempt_path(number)) or {}):
            rebuilt = {"attempt": number, "rebuilt": record.now_text(), "checkpoints": [e.as_json() for e in entries]}
            atomic.write_json(attempt.run.attempt_path(number), {"format": record.FORMAT, **rebuilt})
    attempt.write()


def _recorded(run: RunDirectory, attempt: int) -> list[Checkpoint]:
    """Return what an attempt's record lists; where the record is lost or damaged, what its files say."""
    content = record.read_json(run.attempt_path(attempt)) or {}
    try:
        return [Checkpoint.from_json(entry) for entry in content["checkpoints"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return _rebuilt(run, attempt)


def _rebuilt(run: RunDirectory, attempt: int) -> list[Checkpoint]:
    """Make an attempt's list anew from its objects. An object that lies under its own name is whole: it was synced first."""
    found = []
    public = [run.path / name for name in os.listdir(run.path) if name.endswith(".pth")]
    for name in sorted(object_names(run)):
        number, sequence = map(int, name.removesuffix(".pth").split("-"))
        if number != attempt and (number, attempt) != (0, 1):  # the first attempt lists what a fork brought along
            continue
        path = run.objects_path / name
        try:
            content = integrity.contents(path)
            facts = {"size_bytes": path.stat().st_size, "digest": integrity.digest(path)}
        except CheckpointCorrupt:
            continue
        members = tuple(dict.fromkeys(_members_in(content)))
        is_fork = number == 0 and sequence == 1
        renamed = {said: f"0000-{index:06d}.pth" for index, said in enumerate(members, 2)} if is_fork else {}
        found.append(
            Checkpoint.from_json({
                "attempt": number,
                "sequence": sequence,
                "epoch": content.get("epoch"),
                "step": content.get("step"),
                "metrics": content.get("metrics") or {},
                "names": [link.name for link in public if path.samefile(link)],
                "members": tuple(renamed.values()) or members,
                "renamed": renamed,
                "kind": "average" if "average" in content and "epoch" not in content else
                        "member" if number == 0 and not is_fork else "checkpoint",
                **facts,
            })
        )  # fmt: skip
    return found


def _members_in(content: dict[str, Any]) -> Iterator[str]:
    """Yield the objects that the averages in a checkpoint are made of."""
    for value in content.values():
        members = value.get("members") if isinstance(value, dict) else None
        for member in members if isinstance(members, list) else ():
            if isinstance(member, dict) and isinstance(member.get("object"), str):
                yield member["object"]


def object_names(run: RunDirectory) -> Iterator[str]:
    """Yield the names of the checkpoint objects, committed or not."""
    try:
        names = os.listdir(run.objects_path)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (name for name in names if _OBJECT_NAME.fullmatch(name))


def pinned_objects(run: RunDirectory) -> set[str]:
    """Return the objects that stay whatever `keep` says."""
    try:
        return set(os.listdir(run.pins_path))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def pin(run: RunDirectory, name: str) -> Checkpoint:
    """Let a checkpoint stay whatever `keep` says, under a public name of its own; also while the run is being trained."""
    entry = _entry_named(run, name)
    run.pins_path.mkdir(exist_ok=True)
    atomic.write_bytes(run.pins_path / entry.object_name, b"")
    try:
        atomic.point_name(run.path / _pinned_name(entry), entry.path_in(run))
    except FileNotFoundError:  # retention was quicker
        atomic.remove(run.pins_path / entry.object_name)
        raise _no_such_checkpoint(run, name) from None
    atomic.sync_directory(run.path)
    return entry


def unpin(run: RunDirectory, name: str) -> Checkpoint:
    """Take a pin back; the run's next save removes the file if `keep` says so."""
    entry = _entry_named(run, name)
    atomic.remove(run.pins_path / entry.object_name)
    atomic.remove(run.path / _pinned_name(entry))
    atomic.sync_directory(run.path)
    return entry


def _entry_named(run: RunDirectory, name: str) -> Checkpoint:
    for entry in reversed(read_all(run)):
        if name in (*entry.names, entry.object_name, _pinned_name(entry)):
            return entry
    raise _no_such_checkpoint(run, name)


def _pinned_name(entry: Checkpoint) -> str:
    what = f"epoch_{entry.epoch}" if entry.epoch is not None else f"step_{entry.step}"
    return f"ckpt_pinned_{what}_{entry.object_name}"


def _no_such_checkpoint(run: RunDirectory, name: str) -> CheckpointNotFound:
    there = sorted({found for known in read_all(run) for found in known.names})
    return CheckpointNotFound(f"run {run.run_id} has no {name}; it has {there}", path=str(run.path / name))


def without_names(entry: Checkpoint, names: set[str]) -> Checkpoint:
    """Return the entry as it is once others have taken `names`."""
    return dataclasses.replace(entry, names=tuple(name for name in entry.names if name not in names))


def is_same_content(path: Path, public: Path) -> bool:
    """Whether a public name holds what the object holds, as a link or as a copy."""
    try:
        return path.samefile(public) or integrity.digest(path) == integrity.digest(public)
    except (OSError, CheckpointCorrupt):
        return False


def verify(
    run: RunDirectory,
    checkpoint: Checkpoint,
    on_bytes: Callable[[int], object] = lambda _: None,
    *,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Read the object through and raise CheckpointCorrupt, or OSError, unless it holds what was saved. Without torch.

    `share` (i, n) leaves the other n - 1 shares of its records to others; the first one checks what lies outside them.
    """
    path = checkpoint.path_in(run)
    if share[0] == 0:
        integrity.check_outline(path, size_bytes=checkpoint.size_bytes, expected_digest=checkpoint.digest)
    integrity.check_content(path, on_bytes, share=share)
