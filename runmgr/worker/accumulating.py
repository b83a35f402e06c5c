"""Averages that are kept in an accumulator, from update to update: of all states, or exponentially fading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from runmgr.errors import InvalidInput
from runmgr.worker.averaging import Average, check_outlines, device_of, of_parts, wide
from runmgr.worker.fusing import Pairing, copy_all, empty_parts, quotients_into, set_zero
from runmgr.worker.overlap import Overlap, OverlappingPairing, join
from runmgr.worker.sharding import dense_like, dense_stride
from runmgr.worker.source import check_same
from runmgr.worker.staging import map_tensors
from runmgr.worker.state import module_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from runmgr.worker.sharding import Piece


class Accumulated(Average):
    """An average that is kept in one accumulator, from update to update; for `overlap_with` see `overlap.py`."""

    _name = ""

    def __init__(self, model: nn.Module, *, overlap_with: torch.optim.Optimizer | None = None) -> None:
        super().__init__(model)
        self.count = 0
        self._overlap = Overlap(self.model, overlap_with) if overlap_with is not None else None
        self._parts: list[Tensor] = []
        self._others: Mapping[str, Any] = {}
        self._paired: tuple[list[Tensor], Pairing | OverlappingPairing] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the accumulators in their own precision, the newest integer buffers and the count.

        Every rank; rank 0's is whole, the others' empty. Of one rank alone it shares the average's memory.
        """
        if self.must_gather():
            self._agree("gather the average", check_outlines, self.outline)
            return self.gathered(keep=self._is_main)
        own, layout = module_state(self.model), self._source.layout
        parts = {layout.keys[piece.tensor]: part for piece, part in zip(layout.mine, self.parts(), strict=False)}
        found = {
            key: parts[key].as_strided(own[key].shape, dense_stride(own[key]))
            if key in parts
            else dense_like(own[key], self._source.dtypes[key])  # it has no elements
            for key in layout.keys
        }
        return {"count": self.count, self._name: found if self._parts else {}, "others": self._others}

    def gathered(self, *, keep: bool) -> dict[str, Any]:
        """Return `state_dict` on the ranks that `keep`, on the CPU. Every rank, once all have said that they can."""
        found = self._whole(of_parts(self.parts()), self._source.dtypes, keep=keep) if self._parts else {}
        others = map_tensors(self._others, lambda tensor: tensor.cpu())
        return {"count": self.count, self._name: found, "others": others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, of however many ranks, on the model's device. Every rank."""
        self.count, self._paired = state["count"], None
        self._parts = []
        if not state[self._name]:
            return
        shapes = {key: tuple(tensor.shape) for key, tensor in state[self._name].items()}
        check_same({key: outline[0] for key, outline in self._source.outlines.items()}, shapes, "the saved average")
        self._allocate()
        copy_all(self._parts, self._source.parts_of(state[self._name]))
        if self._is_main:
            device = device_of(module_state(self.model))
            self._others = map_tensors(state["others"], lambda tensor: tensor.to(device, copy=True))

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy no part in the overlap: its model has parameters that the optimizer does not know."""
        return self.__dict__ | {"_parts": self.parts(), "_paired": None, "_overlap": None}

    def parts(self) -> list[Tensor]:
        """Return the accumulators of this rank's part, to be read after all updates."""
        join()
        return self._parts

    def _allocate(self) -> None:
        layout = self._source.layout
        dtypes = [self._source.dtypes[layout.keys[piece.tensor]] for piece in layout.mine]
        self._parts = empty_parts(self._source.views(), dtypes)

    def _pairing(self) -> Pairing | OverlappingPairing:
        """Return the accumulators beside the model's present memory."""
        views = self._source.views()
        if self._paired is None or self._paired[0] is not views:
            if self._paired is not None and [view.device for view in self._paired[0]] != [
                view.device for view in views
            ]:
                parts = self.parts()
                self._allocate()
                copy_all(self._parts, parts)
            overlap = self._overlap
            made = overlap.paired(self._source, self._parts, views) if overlap else Pairing(self._parts, views)
            self._paired = views, made
        return self._paired[1]

    def _counts(self) -> list[Any]:
        return [self.count]

    def _newest_others(self) -> Mapping[str, Any]:
        return self._others


class RunningAverage(Accumulated):
    """The mean of the model's states at all updates, each with the same weight: stochastic weight averaging.

    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization". For the average of some epochs
    call `update()` at their ends only. It takes weights as they are, also those that are not finite.

    Sums are float64, from which the mean comes to one rounding of the weights' type. With `dtype=torch.float32` they take
    half the memory, an update takes as long as one of torch's `AveragedModel`, and n updates may leave n roundings in them.

    `overlap_with=optimizer` lets an update on a GPU run beside the next forward and backward pass: the optimizer's step and
    what reads the average wait for it. Nobody but the optimizer may write to its parameters meanwhile.
    """

    _name = "sums"

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype = torch.float64,
        overlap_with: torch.optim.Optimizer | None = None,
    ) -> None:
        if dtype not in {torch.float32, torch.float64}:
            raise InvalidInput(f"dtype={dtype!r} of the sums must be torch.float64 or torch.float32")
        super().__init__(model, overlap_with=overlap_with)
        self.dtype = dtype

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's present state. Every rank: each adds its share, and none waits for another."""
        if not self._parts:
            self._allocate()
            set_zero(self._parts)
        # on a GPU `add_` converts what it adds as it reads it
        self._pairing().apply(torch._foreach_add_, torch.Tensor.add_)
        self._others = self._source.others()
        self.count += 1

    def describe(self) -> list[dict[str, Any]]:
        """Say how many states were averaged."""
        return [{"states": self.count}]

    def _dtype_for(self, tensor: Tensor) -> torch.dtype:
        if self.dtype == torch.float64:
            return wide(tensor)
        is_narrow = tensor.is_floating_point() and tensor.element_size() < self.dtype.itemsize
        return self.dtype if is_narrow else torch.promote_types(tensor.dtype, self.dtype)

    def _check(self) -> None:
        if not self.count:
            raise InvalidInput("nothing to average yet: call update() first")

    def _fill(self, targets: list[Tensor], group: list[Piece]) -> None:
        parts = self.parts()
        quotients_into(targets, [piece.of(parts) for piece in group], self.count)


class ExponentialAverage(Accumulated):
    """An average that forgets: `average.lerp_(parameter, 1 - decay)` at each update, from the weights at construction.

    With `warmup` the nth update, counted from 0, has the decay `min(decay, (1 + n) / (warmup + n))`, so that the random
    weights of the beginning are soon forgotten; 10 is the usual number, from the `num_updates` of TensorFlow's
    `tf.train.ExponentialMovingAverage`. Parameters of 16 bits are averaged in float32, others in their own precision.
    `overlap_with` is that of `RunningAverage`.
    """

    _name = "averages"

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        warmup: float = 0,
        overlap_with: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(model, overlap_with=overlap_with)
        if not 0 <= decay < 1:
            raise InvalidInput(f"decay={decay!r} must be at least 0 and below 1, such as 0.999")
        if not 0 <= warmup < float("inf"):
            raise InvalidInput(f"warmup={warmup!r} must be at least 0, which means none, such as 10")
        self.decay = decay
        self.warmup = warmup
        self._allocate()
        self._pairing().apply(torch._foreach_copy_, torch.Tensor.copy_)
        self._others = self._source.others()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present state. Every rank: each its share, and none waits for another."""
        decay = min(self.decay, (1 + self.count) / (self.warmup + self.count)) if self.warmup else self.decay
        self._pairing().apply(
            lambda averages, new: torch._foreach_lerp_(averages, new, 1 - decay),
            lambda average, new: average.lerp_(new.to(average.dtype), 1 - decay),
        )
        self._others = self._source.others()
        self.count += 1

    def describe(self) -> list[dict[str, Any]]:
        """Say the decay and how many updates there were."""
        return [{"decay": self.decay, "warmup": self.warmup, "updates": self.count}]

    def _dtype_for(self, tensor: Tensor) -> torch.dtype:
        return torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype

    def _check(self) -> None:
        """There is always something."""

    def _fill(self, targets: list[Tensor], group: list[Piece]) -> None:
        parts = self.parts()
        copy_all(targets, [piece.of(parts) for piece in group])
