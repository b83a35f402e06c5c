"""The average of a model's k best states, whose members are checkpoints that were written anyway."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runmgr.disk import integrity
from runmgr.disk.metrics import is_better
from runmgr.errors import CheckpointCorrupt, InvalidInput, RunError
from runmgr.worker.averaging import Average, is_averaged, like, wide
from runmgr.worker.state import module_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from runmgr.disk.checkpoints import Mode
    from runmgr.worker.averaging import Weights

_logger = logging.getLogger("runmgr.average")
_THREADS = 2  # two read as fast as memory gives


@dataclass
class _Member:
    """One state of the model: its weights in memory until a checkpoint holds them, then that checkpoint's name."""

    metric: float
    number: int
    weights: Weights | None = None
    object_name: str | None = None
    key: str = "net"
    path: Path | None = None

    def load(self) -> Weights:
        if self.weights is not None:
            return self.weights
        if self.path is None:
            raise RunError(
                f"the member {self.object_name} of the average has no file; restore it through Run.restore()"
            )
        from runmgr.worker.loading import load_file

        integrity.check_content(self.path)
        return dict(load_file(self.path, mmap=True)[self.key])


class BestAverage(Average):
    """The mean of the model's `k` best states by a metric: `mode` "max" or "min" says which is better.

    A state that enters is copied on the device until the next save, whose bytes it then shares. Ties keep the older;
    a metric that is not finite, or weights that are not, never enter. Fewer than `k` members are averaged as they are.
    """

    def __init__(self, model: nn.Module, k: int = 10, *, mode: Mode = "max") -> None:
        super().__init__(model)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InvalidInput(f"k={k!r} must be a whole number, at least 1")
        if mode not in {"max", "min"}:
            raise InvalidInput(f"mode={mode!r} must be 'max' or 'min'")
        self.k = k
        self.mode: Mode = mode
        self.members: list[_Member] = []
        self._updates = 0
        self._spare: Weights = {}

    @torch.no_grad()
    def update(self, metric: float) -> bool:
        """Take the model's present state in if it is among the best. Every rank; rank 0's metric decides for all.

        Returns whether it entered; on other ranks always False. Does not communicate.
        """
        metric = float(metric)
        self._updates += 1
        if not self._is_main or not math.isfinite(metric):
            return False
        worst = self._worst() if len(self.members) == self.k else None
        if worst is not None and not is_better(metric, worst.metric, self.mode):
            return False
        own = module_state(self.model)
        if not all(bool(tensor.isfinite().all()) for tensor in own.values() if is_averaged(tensor)):
            return False
        if worst is not None:
            self.members.remove(worst)
            self._reuse(worst)
        self.members.append(_Member(metric, self._updates, self._copy(own)))
        return True

    def _copy(self, own: Weights) -> Weights:
        spare, self._spare = self._spare, {}
        return {
            key: spare[key].copy_(tensor)
            if key in spare and (spare[key].shape, spare[key].dtype) == (tensor.shape, tensor.dtype)
            else tensor.detach().clone()
            for key, tensor in own.items()
        }

    def _reuse(self, member: _Member) -> None:
        """Keep a member's memory for the next one: on a CPU, touching fresh memory costs many times what a copy does."""
        if member.weights is not None:
            self._spare = {key: tensor for key, tensor in member.weights.items() if tensor.device.type == "cpu"}
            member.weights = None

    def lies_in(self, member: _Member, object_name: str, key: str, path: Path) -> None:
        """Let a member share the bytes of a checkpoint, which was saved with it, from now on."""
        member.object_name, member.key, member.path = object_name, key, path
        self._reuse(member)

    def _worst(self) -> _Member:
        """Return the member to leave first: the worst, among equals the newest."""
        worst = self.members[0]
        for member in self.members[1:]:
            if not is_better(member.metric, worst.metric, self.mode):
                worst = member
        return worst

    def shared_member(self, saved: Mapping[str, Any]) -> _Member | None:
        """Return the newest member if it lies in memory and is, bit for bit, the state that is being saved."""
        newest = max(self.members, key=lambda member: member.number, default=None)
        if newest is None or newest.weights is None or newest.weights.keys() != saved.keys():
            return None
        with ThreadPoolExecutor(_THREADS) as pool:
            same = pool.map(_same_bits, newest.weights.values(), [saved[key] for key in newest.weights])
            return newest if all(same) else None

    def state_dict(self, shared: _Member | None = None, object_name: str = "", key: str = "net") -> dict[str, Any]:
        """Return the members: those in checkpoints by name, the others with their weights.

        `shared` is the member whose bytes are those of the checkpoint `object_name` that is being written.
        """
        return {
            "updates": self._updates,
            "members": [
                {
                    "metric": member.metric,
                    "number": member.number,
                    "object": object_name,
                    "key": key,
                    "weights": None,
                }
                if member is shared
                else {
                    "metric": member.metric,
                    "number": member.number,
                    "object": member.object_name,
                    "key": member.key,
                    "weights": member.weights,
                }
                for member in self.members
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; `locate` must follow when members lie in checkpoints (Run.restore does it)."""
        self._updates = state["updates"]
        self.members = []
        if not self._is_main:
            return
        for entry in state["members"]:
            weights = entry["weights"] and like(self.model, entry["weights"])
            self.members.append(_Member(entry["metric"], entry["number"], weights, entry["object"], entry["key"]))
        while len(self.members) > self.k:  # it was saved with a greater k
            self.members.remove(self._worst())

    def locate(self, path_of: Callable[[str], Path]) -> None:
        """Say where the checkpoints lie that hold members; in a fork they have other names, which count from now on."""
        for member in self.members:
            if member.object_name is not None:
                member.path = path_of(member.object_name)
                member.object_name = member.path.name

    def describe(self) -> list[dict[str, Any]]:
        """Name the members, oldest first: metric and, once saved, the checkpoint object."""
        return [
            {"metric": member.metric, "checkpoint": member.object_name}
            for member in sorted(self.members, key=lambda member: member.number)
        ]

    def _compute(self, own: Weights) -> Weights:
        if not self.members:
            raise InvalidInput("nothing to average: no update() with a finite metric so far")
        loaded = self._loaded_members()
        result = {}
        for key, tensor in own.items():
            if not is_averaged(tensor):
                result[key] = loaded[-1][key].to(tensor.device, copy=True)
                continue
            total = torch.zeros_like(tensor, dtype=wide(tensor))
            for weights in loaded:
                total += weights[key].to(tensor.device).to(total.dtype)
            result[key] = (total / len(loaded)).to(tensor.dtype)
        return result

    def _loaded_members(self) -> list[Weights]:
        """Return the members' weights, oldest first; one whose file is lost or damaged leaves the average, loudly."""
        loaded = []
        for member in sorted(self.members, key=lambda member: member.number):
            try:
                loaded.append(member.load())
            except (CheckpointCorrupt, OSError) as error:
                self.members.remove(member)
                _logger.warning(
                    "a member of the average (metric %g) is left out, %d stay: %s",
                    member.metric,
                    len(self.members),
                    error,
                )
                if not self.members:
                    raise
        return loaded


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if one.numel() == 0:
        return True
    one_bytes, other_bytes = _bytes_of(one), _bytes_of(other)
    if one.device.type != "cpu":
        return torch.equal(one_bytes, other_bytes)
    return bool(
        _memcmp()(one_bytes.data_ptr(), other_bytes.data_ptr(), one_bytes.numel()) == 0
    )  # ten times torch.equal


@functools.cache
def _memcmp() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return function
