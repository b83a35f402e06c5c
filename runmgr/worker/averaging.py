"""Averages of a model's weights: of its k best states, of all its states, or exponentially fading.

They live on the model's own device, and on rank 0 only: the ranks of a data-parallel training hold the same
parameters, and `averaged_state_dict()` hands rank 0's result to all. Floating-point parameters and buffers are
averaged; integer and boolean buffers come from the newest member.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from runmgr.disk import integrity
from runmgr.disk.checkpoints import Mode, is_better
from runmgr.errors import CheckpointCorrupt, InvalidInput, RunError
from runmgr.worker import agreement
from runmgr.worker.staging import map_tensors, mapping_like
from runmgr.worker.state import load_module_state, module_state, unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    Weights = dict[str, Tensor]

_logger = logging.getLogger("runmgr.average")
_THREADS = 2  # two read as fast as memory gives


class Average:
    """What the three kinds share: how the result reaches all ranks, and how it is tried out on the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self._others: Weights = {}

    def averaged_state_dict(self) -> Weights:
        """Return the average as a state dict of the bare model: its keys, dtypes and device. Every rank."""
        own = module_state(self.model)
        ranks = agreement.current_ranks()
        result: Weights = mapping_like(own, {})

        def compute(_: list[Any]) -> None:
            result.update(self._compute(own))

        if ranks.world_size == 1:
            compute([])
            return result
        if not dist.is_initialized():
            raise RunError(
                f"{ranks.source} say that {ranks.world_size} ranks run, but there is no process group to send the average "
                f"over; call torch.distributed.init_process_group() first"
            )
        agreement.shared().agree("compute the average", compute)
        for key, tensor in own.items():
            value = result[key] if ranks.is_main else torch.empty_like(tensor)
            result[key] = _broadcast(value)
        return result

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the block, for validation, and the model's own weights back after it.

        Every rank.
        """
        averaged = self.averaged_state_dict()
        own = map_tensors(module_state(self.model), lambda tensor: tensor.detach().clone())
        load_module_state(self.model, averaged)
        try:
            yield
        finally:
            load_module_state(self.model, own)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with this average. Rank 0's counts."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Every rank; only rank 0 keeps it."""
        raise NotImplementedError

    def describe(self) -> list[dict[str, Any]]:
        """Say what the average is made of, as plain data. Rank 0's counts."""
        raise NotImplementedError

    def _compute(self, own: Weights) -> Weights:
        raise NotImplementedError

    @property
    def _is_main(self) -> bool:
        return agreement.current_ranks().is_main

    def _snapshot_others(self) -> None:
        """Remember the buffers that have no average: the newest member's are the ones to keep."""
        self._others = {
            key: tensor.detach().clone() for key, tensor in module_state(self.model).items() if not _is_averaged(tensor)
        }


class RunningAverage(Average):
    """The mean of the model's states at all updates, each with the same weight: stochastic weight averaging.

    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization". Sums are float64.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.count = 0
        self._sums: Weights = {}

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's present state. Every rank, or rank 0 alone: it does not communicate."""
        self.count += 1
        if not self._is_main:
            return
        own = {key: tensor for key, tensor in module_state(self.model).items() if _is_averaged(tensor)}
        if not self._sums:
            self._sums = {key: torch.zeros_like(tensor, dtype=_wide(tensor)) for key, tensor in own.items()}
        torch._foreach_add_(  # the multi-tensor kernels have no public name
            [self._sums[key] for key in own], [tensor.to(_wide(tensor)) for tensor in own.values()]
        )
        self._snapshot_others()

    def state_dict(self) -> dict[str, Any]:
        """Return sums (float64), the newest integer buffers and the count."""
        return {"count": self.count, "sums": self._sums, "others": self._others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, on the model's device."""
        self.count = state["count"]
        if self._is_main:
            self._sums = _like(self.model, state["sums"])
            self._others = _like(self.model, state["others"])

    def describe(self) -> list[dict[str, Any]]:
        """Say how many states were averaged."""
        return [{"states": self.count}]

    def _compute(self, own: Weights) -> Weights:
        if not self.count:
            raise InvalidInput("nothing to average yet: call update() first")
        return {
            key: (self._sums[key] / self.count).to(tensor.dtype) if _is_averaged(tensor) else self._others[key].clone()
            for key, tensor in own.items()
        }


class ExponentialAverage(Average):
    """An average that forgets: `average.lerp_(parameter, 1 - decay)` at each update, from the weights at construction.

    Parameters of 16 bits are averaged in float32, others in their own precision.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        super().__init__(model)
        if not 0 <= decay < 1:
            raise InvalidInput(f"decay={decay!r} must be at least 0 and below 1, such as 0.999")
        self.decay = decay
        self.count = 0
        self._averages: Weights = {}
        if self._is_main:
            self._averages = {
                key: tensor.detach().to(_full(tensor), copy=True)
                for key, tensor in module_state(self.model).items()
                if _is_averaged(tensor)
            }
            self._snapshot_others()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present state. Every rank, or rank 0 alone: it does not communicate."""
        self.count += 1
        if not self._is_main:
            return
        own = {key: tensor for key, tensor in module_state(self.model).items() if key in self._averages}
        torch._foreach_lerp_(  # the multi-tensor kernels have no public name
            [self._averages[key] for key in own],
            [tensor.to(self._averages[key].dtype) for key, tensor in own.items()],
            1 - self.decay,
        )
        self._snapshot_others()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, the newest integer buffers and the count."""
        return {"count": self.count, "averages": self._averages, "others": self._others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, on the model's device."""
        self.count = state["count"]
        if self._is_main:
            self._averages = _like(self.model, state["averages"])
            self._others = _like(self.model, state["others"])

    def describe(self) -> list[dict[str, Any]]:
        """Say the decay and how many updates there were."""
        return [{"decay": self.decay, "updates": self.count}]

    def _compute(self, own: Weights) -> Weights:
        return {
            key: self._averages[key].to(tensor.dtype, copy=True) if _is_averaged(tensor) else self._others[key].clone()
            for key, tensor in own.items()
        }


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
        if not all(bool(tensor.isfinite().all()) for tensor in own.values() if _is_averaged(tensor)):
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
            weights = entry["weights"] and _like(self.model, entry["weights"])
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
            if not _is_averaged(tensor):
                result[key] = loaded[-1][key].to(tensor.device, copy=True)
                continue
            total = torch.zeros_like(tensor, dtype=_wide(tensor))
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


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype to sum in: double precision, or single where the device has no other."""
    if tensor.device.type == "mps":
        return torch.complex64 if tensor.is_complex() else torch.float32
    return torch.complex128 if tensor.is_complex() else torch.float64


def _full(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype


def _like(model: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """Return copies of the weights on the devices where the model has them."""
    own = module_state(model)
    return {key: tensor.to(own[key].device, copy=True) for key, tensor in weights.items()}


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


def _broadcast(tensor: Tensor) -> Tensor:
    """Give rank 0's tensor to all; as bytes, since not every backend knows every dtype."""
    content = tensor.detach().contiguous()
    if content.numel():
        dist.broadcast(content.reshape(-1).view(torch.uint8), src=0)
    return content
