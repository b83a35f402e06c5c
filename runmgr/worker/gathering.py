"""The state that is to be saved, from all ranks to rank 0: checked on each, sharded tensors made whole."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runmgr.errors import InvalidInput, RunError
from runmgr.worker import loading, writing
from runmgr.worker import state as states
from runmgr.worker.accumulating import Accumulated
from runmgr.worker.averaging import Average, check_outlines
from runmgr.worker.best import BestAverage, Held
from runmgr.worker.loadable import loadable
from runmgr.worker.staging import identity, map_tensors, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runmgr.worker.agreement import Agreement


class Gathering:
    """What one rank has to save. `gather` makes one on every rank and brings them together.

    `state_dict()` of everything in `state` is called here, once, on every rank: it may speak with the other ranks.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        averages = {key: value for key, value in state.items() if isinstance(value, Average)}
        own = {key: value.value for key, value in state.items() if isinstance(value, states.PerRank)}
        self._best = {key: value for key, value in sorted(averages.items()) if isinstance(value, BestAverage)}
        self._spread = {
            key: value
            for key, value in sorted(averages.items())
            if isinstance(value, Accumulated) and value.must_gather()
        }
        self._source_keys = {key: _key_of_source(state, average) for key, average in self._best.items()}
        self.held: dict[str, Held] = {}
        self.content = {
            key: loadable(states.state_of(value), key)
            for key, value in state.items()
            if key not in self._best and key not in self._spread and key not in own
        }
        self._own = {key: loadable(states.state_of(value), key) for key, value in own.items()}
        found = {key: list(filter(states.is_sharded, tensors_in(self.content[key]))) for key in sorted(self.content)}
        self._sharded = {key: tensors for key, tensors in found.items() if tensors}
        self.rng: list[dict[str, str]] = []
        self.private: set[int] = set()
        for key, part in self.content.items():
            if states.is_joined_per_rank(part):
                raise InvalidInput(
                    f"state[{key!r}] is a dict with the one key 'per_rank', which runmgr uses; rename it"
                )
        for key, part in self._own.items():
            if any(states.is_sharded(tensor) for tensor in tensors_in(part)):
                raise InvalidInput(f"state[{key!r}] is marked per_rank but holds sharded tensors; leave out the mark")

    def contribution(self) -> dict[str, Any]:
        """Return what rank 0 must know of this rank, as plain data."""
        return {
            "rng": states.rng_state(),
            "own": {key: writing.packed(part) for key, part in self._own.items()},
            "sharded": {key: _outline(tensors) for key, tensors in self._sharded.items()},
            "averages": {key: average.outline() for key, average in self._spread.items()},
            "best": {key: average.held_for(self._source_keys[key]) for key, average in self._best.items()},
        }

    def join(self, contributions: list[dict[str, Any]]) -> dict[str, Any]:
        """Take in what the ranks have of their own; returns what all must know to `make_whole`. Rank 0 only."""
        for rank, contribution in enumerate(contributions):
            _check_same_shards(contributions[0]["sharded"], contribution["sharded"], rank)
        check_outlines([list(entry["averages"].items()) for entry in contributions])
        check_outlines([[(key, held["outline"]) for key, held in entry["best"].items()] for entry in contributions])
        self.rng = [entry["rng"] for entry in contributions]
        for key in self._own:
            self.content[key] = states.joined_per_rank([loading.unpacked(entry["own"][key]) for entry in contributions])
        best = {
            key: average.join([entry["best"][key] for entry in contributions]) for key, average in self._best.items()
        }
        is_spread = (
            contributions[0]["sharded"] or contributions[0]["averages"] or any(one["gather"] for one in best.values())
        )
        return {"is_spread": bool(is_spread), "best": best}

    def hold(self, best: Mapping[str, Any], *, keep: bool) -> None:
        """Bring together what is in memory of the best averages' members, if any is. Every rank."""
        for key, average in self._best.items():
            self.held[key] = average.held(self._source_keys[key], best[key], keep=keep)
            for weights in self.held[key].weights.values():
                self.private |= {identity(tensor) for tensor in tensors_in(weights)}

    def check_room(self) -> None:
        """Raise, before any rank waits for another, where the device cannot hold the greatest tensor whole."""
        tensors = [tensor for part in self._sharded.values() for tensor in part]
        if tensors:
            greatest = max(tensors, key=lambda tensor: tensor.nbytes)
            torch.empty(greatest.shape, dtype=greatest.dtype, device=greatest.device_mesh.device_type)  # type: ignore[attr-defined]

    def make_whole(self, *, keep: bool) -> None:
        """Make the sharded tensors whole, one at a time; rank 0 keeps them, on its CPU. Every rank.

        A rank that fails to keep one goes on taking part, so that no other waits for it. One that fails within torch's
        own exchange, out of memory on its device beyond what `check_room` found, does not: the others then wait for as
        long as their process group's time-out says.
        """
        failures: list[Exception] = []

        def whole(tensor: torch.Tensor) -> torch.Tensor | None:
            if not states.is_sharded(tensor):
                return tensor
            full = _full(tensor)
            if not keep or failures:
                return None
            try:
                return self._kept(full.detach(), tensor.to_local())  # type: ignore[attr-defined]
            except (RuntimeError, MemoryError, RunError) as error:
                failures.append(error)
                return None

        for key in self._sharded:
            self.content[key] = map_tensors(self.content[key], whole)
        self._sharded = {}
        for key, average in self._spread.items():
            self.content[key] = average.gathered(keep=keep)
            self.private |= {identity(tensor) for tensor in tensors_in(self.content[key])}
        if failures:
            raise failures[0]

    def _kept(self, full: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Return a whole tensor on the CPU, and remember whether its memory is its own; with one rank it may be the model's."""
        found: torch.Tensor = loadable(full.cpu(), "a sharded tensor")
        if found.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
            self.private.add(identity(found))
        return found


def _full(sharded: Any) -> torch.Tensor:
    """Return all of a DTensor. Shards that FSDP2 offloads go to the device that exchanges them first."""
    place = sharded.device_mesh.device_type
    full: torch.Tensor = (sharded if sharded.device.type == place else sharded.to(place)).full_tensor()
    return full


def gather(
    agreement: Agreement,
    what: str,
    take: Callable[[], Gathering],
    write: Callable[[Gathering], None],
) -> None:
    """Take the state on every rank, and `write` it on rank 0. Every rank; whatever raises, raises the same on all.

    Whether tensors must be made whole is decided on rank 0 with the answers of all, since all must then take part.
    """
    gatherings: list[Gathering] = []

    def contribute() -> dict[str, Any]:
        gatherings.append(take())
        gatherings[0].check_room()
        return gatherings[0].contribution()

    def decide(contributions: list[dict[str, Any]]) -> dict[str, Any]:
        joined = gatherings[0].join(contributions)
        if not joined["is_spread"]:
            gatherings[0].hold(joined["best"], keep=True)
            write(gatherings[0])
        return joined

    joined = agreement.agree(what, decide, contribute)
    (gathering,) = gatherings
    is_main = agreement.ranks.is_main

    def make_whole() -> None:
        gathering.hold(joined["best"], keep=is_main)
        gathering.make_whole(keep=is_main)

    if joined["is_spread"]:
        agreement.agree(what, lambda _: write(gathering), make_whole)
    elif not is_main:
        gathering.hold(joined["best"], keep=False)


def _key_of_source(state: Mapping[str, Any], average: BestAverage) -> str:
    """Return the key under which lies what an average takes its members from, its model or other average; or nothing."""
    for key, value in state.items():
        if average.faded is None and isinstance(value, nn.Module) and states.unwrap(value) is average.model:
            return key
        if average.faded is not None and value is average.faded:
            return key
    return ""


def _outline(tensors: list[torch.Tensor]) -> list[Any]:
    """Say how many tensors these are, and by a digest which, since all ranks must make the same ones whole in one order."""
    shapes = repr([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
    return [len(tensors), hashlib.sha256(shapes.encode()).hexdigest()]


def _check_same_shards(first: dict[str, Any], other: dict[str, Any], rank: int) -> None:
    for key in sorted(first.keys() | other.keys()):
        (count, digest), (other_count, other_digest) = (found.get(key, (0, "")) for found in (first, other))
        if digest != other_digest:
            shapes = ", of other shapes or in another order" if count == other_count else ""
            raise InvalidInput(
                f"state[{key!r}] has {count} sharded tensors on rank 0 and {other_count} on rank {rank}{shapes}; every rank "
                f"must give the same state"
            )
