"""File → state, on every rank: choose a checkpoint that is whole, load it. The one place that calls torch.load.

All ranks of a host check a file together, each its share of the records. What one of them reads then lies in the page
cache, where the others find it: a file crosses the network once for each host, and no rank holds a copy of it.
"""

from __future__ import annotations

import base64
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from runmgr.disk import checkpoints
from runmgr.errors import CheckpointCorrupt, CheckpointNotFound

if TYPE_CHECKING:
    import logging
    from collections.abc import Generator

    from runmgr.disk.directory import RunDirectory
    from runmgr.disk.shelf import Shelf
    from runmgr.worker.agreement import Agreement


# What torch's unpickler itself says, in the middle of its advice.
_REFUSAL = re.compile(r"WeightsUnpickler error:\s*(.+?)(?= Please use |\n|$)")


class Progress(NamedTuple):
    """How far a training has come: `epoch` finished epochs, `step` finished steps, and what was saved with them.

    `values` holds the plain values of the state by their keys; `checkpoint` is the file that was loaded, None when
    the run is fresh.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    values: dict[str, Any]
    checkpoint: Path | None


class Chosen(NamedTuple):
    """The loaded file, as the log calls it; `renamed` translates members of averages after a fork."""

    path: Path
    shown: str
    renamed: dict[str, str]
    content: Any


def load_file(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Load a file with `weights_only=True`; raises CheckpointCorrupt when it is no whole checkpoint.

    With `mmap` the tensors are the file's own pages, which all processes of a host share: copy what is to stay.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        found = _REFUSAL.search(str(error))
        reason = found[1].strip() if found else str(error)
        raise CheckpointCorrupt(
            f"{path} holds what torch.load(weights_only=True) of torch {torch.__version__} does not read: {reason} It was "
            f"saved by another program or a newer torch; if you trust it, save its tensors and plain values anew.",
            path=str(path),
            reason=reason,
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointCorrupt(f"{path} cannot be loaded: {error}", path=str(path), reason=str(error)) from error


def can_map(path: Path) -> bool:
    """Whether `load_file(mmap=True)` can read this format; torch's old one it cannot."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def unpacked(text: str) -> Any:
    """Return what `writing.packed` was given."""
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)


def choose(
    agreement: Agreement, run: RunDirectory, shelf: Shelf | None, name: str, logger: logging.Logger
) -> Chosen | None:
    """Load the newest checkpoint that is whole, or exactly the one called `name`; None if there is none yet. Every rank.

    `shelf` is rank 0's, which offers one after the other; the ranks of each host read it through, then each loads it.
    """
    offers = _offers(shelf, name, logger) if shelf is not None else None
    offer: dict[str, Any] | None = None
    step = "offer"
    loaded: list[Any] = []

    def contribute() -> dict[str, Any]:
        problem = None
        if offer and step == "verify":
            problem = _problem(run, offer, agreement)
        elif offer and step == "load":
            loaded[:], problem = _loaded(Path(offer["path"]), agreement)
        return {"host": agreement.ranks.host, "problem": problem}

    def decide(answers: list[dict[str, Any]]) -> dict[str, Any]:
        assert offers is not None
        problem = next((answer["problem"] for answer in answers if answer["problem"]), "")
        if offer and not problem:
            return {"offer": offer, "step": "load" if step == "verify" else "end"}
        found = offers.send(problem) if offer else next(offers)
        if found is None:
            return {"offer": None, "step": "end"}
        shares = _shares([answer["host"] for answer in answers])
        return {"offer": found | {"shares": shares}, "step": "verify" if found["entry"] else "load"}

    while step != "end":
        answer = agreement.agree(f"choose a checkpoint of {run.path}", decide, contribute)
        offer, step = answer["offer"], answer["step"]
    return Chosen(Path(offer["path"]), offer["shown"], offer["renamed"], loaded[0]) if offer else None


def _offers(shelf: Shelf, name: str, logger: logging.Logger) -> Generator[dict[str, Any] | None, str, None]:
    """Yield what `name` can stand for, in turn, and take what is wrong with it. Rank 0 only."""
    if name != "latest":
        public = shelf.run.public_path(name)
        entry = shelf.named(public.name)
        if entry is not None:
            problem = yield _offer(shelf, entry)
            shelf.reject(entry, problem)
            raise CheckpointCorrupt(problem, path=str(entry.path_in(shelf.run)), reason=problem)
        if not public.exists():
            there = sorted({found for known in shelf.checkpoints for found in known.names})
            raise CheckpointNotFound(f"run {shelf.run.run_id} has no {public.name}; it has {there}", path=str(public))
        problem = yield _foreign(public)
        raise CheckpointCorrupt(problem, path=str(public), reason=problem)
    rejected: list[str] = []
    for entry in reversed(shelf.checkpoints):
        problem = yield _offer(shelf, entry)
        logger.warning("not restoring %s: %s", entry.object_name, problem)
        rejected.append(problem)
        shelf.reject(entry, problem)
    if rejected:
        raise CheckpointCorrupt(
            f"none of the {len(rejected)} checkpoints of {shelf.run.path} is whole: " + "; ".join(rejected),
            path=str(shelf.run.path),
            reason="none is whole",
        )
    foreign = shelf.run.public_path("latest")
    problem = yield _foreign(foreign) if foreign.exists() else None
    raise CheckpointCorrupt(problem, path=str(foreign), reason=problem)


def _offer(shelf: Shelf, entry: checkpoints.Checkpoint) -> dict[str, Any]:
    return {
        "entry": entry.as_json(),
        "path": str(entry.path_in(shelf.run)),
        "shown": f"{entry.object_name} ({', '.join(entry.names) or 'no public name'})",
        "renamed": entry.renamed,
    }


def _foreign(path: Path) -> dict[str, Any]:
    """Offer a file that another program saved, such as super-gradients; nothing is known to check it by."""
    return {"entry": None, "path": str(path), "shown": path.name, "renamed": {}}


def _shares(hosts: list[str]) -> list[tuple[int, int]]:
    """Return for each rank which of how many shares of its host's reading is its own."""
    return [(hosts[:rank].count(host), hosts.count(host)) for rank, host in enumerate(hosts)]


def _problem(run: RunDirectory, offer: dict[str, Any], agreement: Agreement) -> str | None:
    """Check this rank's share of what is offered and say what is wrong with it."""
    share = offer["shares"][agreement.ranks.rank]
    try:
        checkpoints.verify(run, checkpoints.Checkpoint.from_json(offer["entry"]), share=tuple(share))
    except (CheckpointCorrupt, OSError) as error:
        return _told(error, agreement)
    return None


def _loaded(path: Path, agreement: Agreement) -> tuple[list[Any], str | None]:
    """Return in a list what the file holds, mapped from it, or what is wrong with it."""
    try:
        content = load_file(path, mmap=can_map(path))
    except (CheckpointCorrupt, OSError) as error:
        return [], _told(error, agreement)
    if not isinstance(content, Mapping):
        return [], f"{path} holds a {type(content).__name__}, not a dict"
    return [{key: value for key, value in content.items() if _is_ours(key, value)}], None


def _is_ours(key: str, value: object) -> bool:
    """Whether this is what runmgr writes under its own keys, by which another program may mean something else."""
    match key:
        case "epoch" | "step":
            return isinstance(value, int)
        case "metrics":
            return isinstance(value, Mapping)
        case "rng":
            return isinstance(value, list) and all(isinstance(each, Mapping) and "python" in each for each in value)
    return True


def _told(error: Exception, agreement: Agreement) -> str:
    return f"{error} (read on {agreement.ranks.host})" if agreement.ranks.world_size > 1 else str(error)


def progress(content: Mapping[str, Any], path: Path | None) -> Progress:
    """Return how far the training had come that a checkpoint is of; an empty one is of a fresh run."""
    counts = content.get("epoch") or 0, content.get("step") or 0
    return Progress(*counts, content.get("metrics") or {}, content.get("values", {}), path)
