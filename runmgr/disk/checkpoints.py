"""Checkpoint objects and what is known of them: records, order, which is better, whether the bytes are right.

An object is `.runmgr/checkpoints/<attempt>-<sequence>.pth`. It counts once its attempt's record lists it; the public
names (`ckpt_latest.pth`, …) are further hard links to it. Order is (attempt, sequence), never mtime, never text.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from runmgr.disk import atomic, integrity, record
from runmgr.disk.directory import BEST_NAME, LATEST_NAME
from runmgr.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from runmgr.disk.directory import RunDirectory

Mode = Literal["max", "min"]
_T = TypeVar("_T")
_OBJECT_NAME = re.compile(r"(\d{4,})-(\d{6,})\.pth")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint, as its attempt's record lists it.

    attempt, sequence  its place in the order; attempt 0 stands for what a fork brought along
    epoch, step        how many were finished, None where that was not said
    metrics            what was given to `Run.save`
    size_bytes         of the file
    digest             SHA-256 of what no CRC in the file covers; "" where it was found damaged and nothing is known of it
    names              the public names that it has
    members            the objects that the averages in it are made of
    renamed            after a fork: where members lie now, by the names that the file itself says
    kind               "checkpoint", "average" (average_model.pth), or "member" of an average, brought along by a fork
    saved              when, UTC, ISO 8601
    logged             the greatest step that TensorBoard had been given by then, -1 for nothing
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
    logged: int | None = None

    @property
    def object_name(self) -> str:
        """The object's name, without its directory."""
        return f"{self.attempt:04d}-{self.sequence:06d}.pth"

    @property
    def order(self) -> tuple[int, int]:
        """What newer means: attempt, then sequence."""
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


class Books(NamedTuple):
    """What the records of all attempts add up to.

    `entries` are the checkpoints that count, oldest first, also those whose objects are missing; `dropped` is what
    retention decided to remove, which a kill may have left on disk; `damaged` names the objects that a restore rejected.
    """

    entries: list[Checkpoint]
    present: set[str]
    dropped: list[Checkpoint]
    damaged: frozenset[str]
    newest_lost: int


def read_all(run: RunDirectory) -> list[Checkpoint]:
    """Return the run's committed checkpoints whose objects are there, oldest first."""
    books = read_books(run)
    return _owning_names(run, [entry for entry in books.entries if entry.object_name in books.present], books.damaged)


def listed(run: RunDirectory) -> list[Checkpoint]:
    """Return what `read_all` does, and those whose objects ought to be there and are not.

    What an attempt with a lost record removed of its predecessors' is not known, so of those none ought to be there.
    One without a digest was found damaged when its record was made anew; `verify` refuses it.
    """
    books = read_books(run)
    entries = [
        entry
        for entry in books.entries
        if entry.object_name in books.present or max(entry.attempt, 1) >= books.newest_lost
    ]
    return _owning_names(run, entries, books.damaged)


def _owning_names(run: RunDirectory, entries: list[Checkpoint], damaged: frozenset[str]) -> list[Checkpoint]:
    content = record.look_at_json(run.record_path)
    monitor = content.get("monitor")  # which another program may have put there
    mode: Mode = "min" if content.get("mode") == "min" else "max"
    return with_names(entries, damaged, monitor if isinstance(monitor, str) else None, mode)


def with_names(
    entries: list[Checkpoint], damaged: Collection[str], monitor: str | None, mode: Mode
) -> list[Checkpoint]:
    """Return the entries, each with the public names that it owns now.

    Latest is the newest checkpoint, best the best by `monitor`; any other name is the newest one's that claims it. One
    that is known to be damaged owns only what no other can.
    """
    owners: dict[str, tuple[int, int]] = {}
    for entry in sorted(entries, key=lambda entry: entry.object_name not in damaged):  # the last one to claim it wins
        owners |= dict.fromkeys(entry.names, entry.order)
    checkpoints = [entry for entry in entries if entry.kind == "checkpoint"]
    whole = [entry for entry in checkpoints if entry.object_name not in damaged]
    if checkpoints:
        owners[LATEST_NAME] = max(entry.order for entry in whole or checkpoints)
    for best in ranked(whole, monitor, mode)[:1]:
        owners[BEST_NAME] = best.order
    return [
        dataclasses.replace(entry, names=tuple(name for name in claimed if owners.get(name) == entry.order))
        for entry in entries
        for claimed in [dict.fromkeys((LATEST_NAME, BEST_NAME, *entry.names))]
    ]


class _Account(NamedTuple):
    """What the record of one attempt says; where it is lost or damaged, what the attempt's files say."""

    number: int
    content: dict[str, Any]
    checkpoints: list[Checkpoint]
    dropped: list[tuple[Checkpoint, int]]  # each with the sequence number of the save that did it
    accepts: dict[int, int] | None
    damaged: frozenset[str] | None
    is_lost: bool

    @property
    def last(self) -> int:
        """The sequence number of its newest commit."""
        return max((entry.sequence for entry in self.checkpoints if entry.attempt), default=0)


def _read_account(run: RunDirectory, number: int) -> _Account:
    content = record.read_json(run.attempt_path(number)) or {}

    def parsed(read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except (KeyError, TypeError, ValueError, AttributeError):
            return otherwise

    found = parsed(lambda: [Checkpoint.from_json(entry) for entry in content["checkpoints"]], None)
    return _Account(
        number,
        content,
        _rebuilt(run, number) if found is None else found,
        parsed(lambda: [(Checkpoint.from_json(entry), int(entry["by"])) for entry in content["dropped"]], []),
        parsed(lambda: {int(name): int(last) for name, last in content["accepts"].items()}, None),
        parsed(lambda: frozenset(map(str, content["damaged"])), None),
        found is None or "rebuilt" in content,
    )


def recorded(run: RunDirectory, attempt: int) -> list[Checkpoint]:
    """Return what an attempt's record lists; where the record is lost or damaged, what its files say."""
    return _read_account(run, attempt).checkpoints


def _limits(accounts: list[_Account]) -> dict[int, int]:
    """Return up to which sequence number each attempt is believed, as the newest one that judged it wrote down."""
    limits: dict[int, int] = {}
    for account in accounts:  # each judgement is no milder than those before it
        limits |= account.accepts or {}
    return limits


def read_books(run: RunDirectory) -> Books:
    """Read the records of all attempts.

    Raises OSError when one is there and cannot be read, RunError when a newer version of runmgr wrote in this run.
    """
    accounts = [_read_account(run, number) for number in record.attempt_numbers(run)]
    record.check_format(run, [account.content for account in accounts])
    limits = _limits(accounts)
    unnamed = 0 if accounts and accounts[-1].accepts is not None else math.inf
    found: dict[tuple[int, int], Checkpoint] = {}
    gone: dict[tuple[int, int], Checkpoint] = {}
    for account in accounts:
        limit = math.inf if account is accounts[-1] else limits.get(account.number, unnamed)
        not_believed = [entry for entry, by in account.dropped if by > limit]
        for entry in [*account.checkpoints, *not_believed]:
            if entry.attempt < account.number or entry.sequence <= limit:
                found[entry.order] = entry
        gone |= {entry.order: entry for entry, by in account.dropped if by <= limit}
    rejected = [account.damaged for account in accounts if account.damaged is not None][-1:]  # the newest has them all
    damaged = frozenset().union(*rejected) | {entry.object_name for entry in found.values() if not entry.digest}
    present = set(object_names(run))
    whole = [entry for order, entry in found.items() if order not in gone and entry.object_name in present - damaged]
    spared = {
        entry.order: entry for entry in gone.values() if entry.object_name in present and not _is_replaced(entry, whole)
    }
    found = {order: entry for order, entry in (found | spared).items() if order not in gone or order in spared}
    dropped = [entry for order, entry in gone.items() if order not in spared]
    newest_lost = max((account.number for account in accounts if account.is_lost), default=0)
    return Books([found[order] for order in sorted(found)], present, dropped, damaged, newest_lost)


def _is_replaced(dropped: Checkpoint, whole: list[Checkpoint]) -> bool:
    """Whether something newer of its kind is there, without which no dropped object is given up."""
    kind = "checkpoint" if dropped.kind == "member" else dropped.kind
    return any(entry.kind == kind and entry.order > dropped.order for entry in whole)


def accept_predecessors(attempt: record.Attempt) -> None:
    """Write down how far the earlier attempts are believed: as far as they had come when this one had its number.

    A predecessor looks for a newer attempt after each commit and before it reports the save as done, so every save
    that was reported is accepted here. What an attempt in between refused stays refused; one that died before it had
    written that down refused nothing.
    """
    run = attempt.run
    accounts = [_read_account(run, number) for number in record.attempt_numbers(run) if number < attempt.number]
    limits = _limits(accounts)
    attempt.content["accepts"] = {
        str(account.number): min(account.last, limits.get(account.number, account.last)) for account in accounts
    }
    for account in accounts:
        if account.checkpoints and "checkpoints" not in account.content:
            rebuilt = {
                "format": record.FORMAT,
                "attempt": account.number,
                "rebuilt": record.now_text(),
                "checkpoints": [entry.as_json() for entry in account.checkpoints],
            }
            atomic.write_json(run.attempt_path(account.number), account.content | rebuilt)
    attempt.write()


def _rebuilt(run: RunDirectory, attempt: int) -> list[Checkpoint]:
    """Make an attempt's list anew from its objects; one that lies under its own name was synced first.

    A damaged one is listed without a digest, which `verify` refuses: it is not known what it was, only that it counted.
    """
    public = [run.path / name for name in os.listdir(run.path) if name.endswith(".pth")]
    found = []
    for name in sorted(object_names(run)):
        number, sequence = map(int, name.removesuffix(".pth").split("-"))
        if number != attempt and (number, attempt) != (0, 1):  # the first attempt lists what a fork brought along
            continue
        path = run.objects_path / name
        is_member = number == 0 and sequence > 1
        entry = Checkpoint(
            attempt=number,
            sequence=sequence,
            size_bytes=path.stat().st_size,
            names=tuple(link.name for link in public if path.samefile(link)),
            kind="member" if is_member else "checkpoint",
        )
        try:
            content, digest = integrity.contents(path), integrity.digest(path)
        except CheckpointCorrupt:
            found.append(entry)
        else:
            found.append(_described(dataclasses.replace(entry, digest=digest), content))
    return found


def _described(entry: Checkpoint, content: dict[str, Any]) -> Checkpoint:
    """Add what a checkpoint file says of itself."""
    members = tuple(dict.fromkeys(_members_in(content)))
    is_fork = entry.attempt == 0 and entry.kind == "checkpoint"
    renamed = {said: f"0000-{index:06d}.pth" for index, said in enumerate(members, 2)} if is_fork else {}
    facts = {
        "epoch": content.get("epoch"),
        "step": content.get("step"),
        "metrics": content.get("metrics") or {},
        "members": tuple(renamed.values()) or members,
        "renamed": renamed,
        "kind": "average" if "average" in content and "epoch" not in content else entry.kind,
    }
    return Checkpoint.from_json(entry.as_json() | facts)


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
