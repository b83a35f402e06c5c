"""Averages of a model's weights: of all its states, or exponentially fading; of its k best states in `best.py`.

They live on the model's own device, and on rank 0 only: the ranks of a data-parallel training hold the same
parameters, and `averaged_state_dict()` hands rank 0's result to all. Floating-point parameters and buffers are
averaged; integer and boolean buffers come from the newest member.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from runmgr.errors import InvalidInput, RunError
from runmgr.worker import agreement
from runmgr.worker.staging import map_tensors, mapping_like
from runmgr.worker.state import load_module_state, module_state, unwrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    Weights = dict[str, Tensor]


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
            key: tensor.detach().clone() for key, tensor in module_state(self.model).items() if not is_averaged(tensor)
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
        own = {key: tensor for key, tensor in module_state(self.model).items() if is_averaged(tensor)}
        if not self._sums:
            self._sums = {key: torch.zeros_like(tensor, dtype=wide(tensor)) for key, tensor in own.items()}
        torch._foreach_add_(  # the multi-tensor kernels have no public name
            [self._sums[key] for key in own], [tensor.to(wide(tensor)) for tensor in own.values()]
        )
        self._snapshot_others()

    def state_dict(self) -> dict[str, Any]:
        """Return sums (float64), the newest integer buffers and the count."""
        return {"count": self.count, "sums": self._sums, "others": self._others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, on the model's device."""
        self.count = state["count"]
        if self._is_main:
            self._sums = like(self.model, state["sums"])
            self._others = like(self.model, state["others"])

    def describe(self) -> list[dict[str, Any]]:
        """Say how many states were averaged."""
        return [{"states": self.count}]

    def _compute(self, own: Weights) -> Weights:
        if not self.count:
            raise InvalidInput("nothing to average yet: call update() first")
        return {
            key: (self._sums[key] / self.count).to(tensor.dtype) if is_averaged(tensor) else self._others[key].clone()
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
                if is_averaged(tensor)
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
            self._averages = like(self.model, state["averages"])
            self._others = like(self.model, state["others"])

    def describe(self) -> list[dict[str, Any]]:
        """Say the decay and how many updates there were."""
        return [{"decay": self.decay, "updates": self.count}]

    def _compute(self, own: Weights) -> Weights:
        return {
            key: self._averages[key].to(tensor.dtype, copy=True) if is_averaged(tensor) else self._others[key].clone()
            for key, tensor in own.items()
        }


def is_averaged(tensor: Tensor) -> bool:
    """Whether it has an average; of others the newest member's counts."""
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype to sum in: double precision, or single where the device has no other."""
    if tensor.device.type == "mps":
        return torch.complex64 if tensor.is_complex() else torch.float32
    return torch.complex128 if tensor.is_complex() else torch.float64


def _full(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype


def like(model: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """Return copies of the weights on the devices where the model has them."""
    own = module_state(model)
    return {key: tensor.to(own[key].device, copy=True) for key, tensor in weights.items()}


def _broadcast(tensor: Tensor) -> Tensor:
    """Give rank 0's tensor to all; as bytes, since not every backend knows every dtype."""
    content = tensor.detach().contiguous()
    if content.numel():
        dist.broadcast(content.reshape(-1).view(torch.uint8), src=0)
    return content
