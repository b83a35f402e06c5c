"""What averages of a model's weights share: those of all its states are in `accumulating.py`, of its k best in `best.py`.

They live on the model's own device. Each rank keeps and updates its share of them, see `sharding.py`: what is done to an
element does not depend on where that is done, so the result has the same bits however many ranks there are.
Floating-point parameters and buffers are averaged; integer and boolean buffers come from the newest member.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from runmgr.errors import InvalidInput, RunError
from runmgr.worker import agreement
from runmgr.worker.fusing import copy_all
from runmgr.worker.overlap import join
from runmgr.worker.sharding import Layout, Piece, check_group, dense_like, flat
from runmgr.worker.source import Source, is_averaged, set_aside, write_into
from runmgr.worker.staging import map_tensors, mapping_like
from runmgr.worker.state import beside, load_module_state, local_part, module_state, unwrap, with_local_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    Weights = dict[str, Tensor]
    Fill = Callable[[list[Tensor], list[Piece]], object]


class Average:
    """What the three kinds share: how the ranks' parts become one result, and how it is tried out on the model."""

    keeps_copies = True  # what `load_state_dict` is given may be a file's own pages

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self._found: Source | None = None

    def averaged_state_dict(self) -> Weights:
        """Return the average as a state dict of the bare model: its keys, dtypes and device. Every rank.

        A sharded model (FSDP2) gets shards, like those that its own state dict has.
        """
        self._meet("compute the average")
        own = module_state(self.model)
        result: Weights = mapping_like(own, dict(own))
        for key in self._source.layout.keys:
            result[key] = beside(own[key], dense_like(local_part(own[key])))
        self._share([flat(local_part(result[key])) for key in self._source.layout.keys], own)
        result.update(self._shared_others(own))
        return result

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model's own tensors for the block, and the model's own weights back after it.

        Every rank; they meet at the beginning only. The own weights are kept beside on each rank meanwhile, in host memory
        where its device has no room.
        """
        self._meet("compute the average")
        own = module_state(self.model)
        kept = map_tensors(own, set_aside)
        join()  # another average's update may still read what is written now
        try:
            if self._source.writes_through:
                self._share([flat(local_part(own[key])) for key in self._source.layout.keys], own)
                write_into(own, self._shared_others(own))
            else:
                load_module_state(self.model, self.averaged_state_dict())
            yield
        finally:
            join()
            if self._source.writes_through:
                write_into(module_state(self.model), kept)
            else:
                load_module_state(self.model, kept)

    def whole(self, *, keep: bool) -> Weights:
        """Return the average for a file: all of each tensor, on the CPU. Every rank; those that do not `keep` get nothing."""
        self._meet("compute the average")
        own = module_state(self.model)
        dtypes = {key: own[key].dtype for key in self._source.layout.keys}
        found = self._whole(self._fill, dtypes, keep=keep)
        if not keep:
            return {}
        others = map_tensors(self._newest_others(), lambda tensor: tensor.detach().to("cpu", copy=True))
        return mapping_like(own, {key: (found | others)[key] for key in own})

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with this average. Every rank; rank 0's is whole."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, of however many ranks. Every rank."""
        raise NotImplementedError

    def describe(self) -> list[dict[str, Any]]:
        """Say what the average is made of, as plain data."""
        raise NotImplementedError

    def must_gather(self) -> bool:
        """Whether other ranks hold parts of it."""
        return self._source.ranks.world_size > 1 or self._source.layout.has_shards

    @property
    def _source(self) -> Source:
        if self._found is None:
            self._found = Source(self.model, self._dtype_for)
        return self._found

    @property
    def _is_main(self) -> bool:
        return self._source.ranks.is_main

    def _dtype_for(self, tensor: Tensor) -> torch.dtype:
        """Return the dtype to accumulate in."""
        return wide(tensor)

    def _check(self) -> None:
        """Raise InvalidInput when there is nothing to average yet."""
        raise NotImplementedError

    def _counts(self) -> list[Any]:
        """Return, as plain data, what of this kind of average must be the same on all ranks."""
        raise NotImplementedError

    def _fill(self, targets: list[Tensor], group: list[Piece]) -> None:
        """Write the average of these elements, which this rank keeps, to tensors of any dtypes."""
        raise NotImplementedError

    def _newest_others(self) -> Mapping[str, Any]:
        """Return what is not averaged, as the newest member has it. Rank 0's counts."""
        raise NotImplementedError

    def outline(self) -> list[Any]:
        """Return, as plain data, what must be the same on all ranks; raises when this rank cannot take part."""
        ranks, now = self._source.ranks, agreement.current_ranks()
        if (ranks.rank, ranks.world_size) != (now.rank, now.world_size):
            raise RunError(
                f"the average was begun on rank {ranks.rank} of {ranks.world_size}, and this is rank {now.rank} of "
                f"{now.world_size} now; make averages after torch.distributed.init_process_group()"
            )
        check_group(ranks)
        tensors = repr({key: (outline[0], self._source.dtypes[key]) for key, outline in self._source.outlines.items()})
        return [type(self).__name__, hashlib.sha256(tensors.encode()).hexdigest()[:8], *self._counts()]

    def _meet(self, what: str) -> None:
        """Come together before anything is sent: what is wrong on one rank raises the same error on all."""

        def contribute() -> list[Any]:
            self._check()
            return self.outline()

        self._agree(what, check_outlines, contribute)

    def _agree(self, what: str, decide: Callable[[list[Any]], Any], contribute: Callable[[], Any]) -> Any:
        if agreement.current_ranks().world_size == 1:
            return decide([contribute()])
        return agreement.shared().agree(what, decide, contribute)

    def _share(self, targets: list[Tensor], own: Weights) -> None:
        layout = self._source.layout
        layout.share(self._fill, targets, [own[key].dtype for key in layout.keys], device_of(own))

    def _shared_others(self, own: Weights) -> Weights:
        """Return what is not averaged; what is no tensor is each rank's own."""
        others = self._newest_others()
        if self._source.ranks.world_size == 1:
            return {key: map_tensors(value, partial(_copy_beside, own.get(key))) for key, value in others.items()}
        tensors = {
            key: value for key, value in own.items() if isinstance(value, torch.Tensor) and not is_averaged(value)
        }
        layout = Layout(tensors, (), {key: tensor.dtype for key, tensor in tensors.items()}, self._source.ranks)
        found = {key: dense_like(tensor) for key, tensor in tensors.items()}
        sent = layout.views({key: others[key] for key in tensors}) if self._is_main else []
        layout.share(
            of_parts(sent),
            [flat(tensor) for tensor in found.values()],
            [tensor.dtype for tensor in found.values()],
            device_of(own),
        )
        return found

    def _whole(self, fill: Fill, dtypes: Mapping[str, torch.dtype], *, keep: bool) -> Weights:
        """Bring all parts together on the CPU of the ranks that `keep`."""
        own, layout = module_state(self.model), self._source.layout
        found = {key: dense_like(local_part(own[key]), dtypes[key], "cpu") for key in layout.keys} if keep else {}
        targets = [flat(tensor) for tensor in found.values()] if keep else None
        layout.share(fill, targets, [dtypes[key] for key in layout.keys], device_of(own))
        for piece in layout.mine[layout.travelling :]:
            key = layout.keys[piece.tensor]
            local = dense_like(local_part(own[key]), dtypes[key])
            fill([flat(local)], [piece])
            full = with_local_part(own[key], local).full_tensor()  # type: ignore[attr-defined]
            if keep:
                found[key] = full.cpu()
        return found


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype to sum in: double precision, or single where the device has no other."""
    if tensor.device.type == "mps":
        return torch.complex64 if tensor.is_complex() else torch.float32
    return torch.complex128 if tensor.is_complex() else torch.float64


def of_parts(parts: list[Tensor]) -> Fill:
    """Return what writes pieces of these parts to other tensors."""
    return lambda targets, group: copy_all(targets, [piece.of(parts) for piece in group])


def check_outlines(found: list[list[Any]]) -> None:
    """Raise InvalidInput unless the ranks' `outline`s are the same."""
    for rank, other in enumerate(found):
        if other != found[0]:
            raise InvalidInput(
                f"an average is not the same on rank 0 ({found[0]}: kind, digest of the tensors, updates) and on rank "
                f"{rank} ({other}); every rank must average the same model in the same dtype and call update() equally often"
            )


def device_of(own: Weights) -> torch.device:
    """Return the device that a model lies on."""
    tensors = (value for value in own.values() if isinstance(value, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _copy_beside(own: Any, tensor: Tensor) -> Tensor:
    """Copy a tensor, which may come from a file, to where the model's own lies."""
    return tensor.detach().to(own.device if isinstance(own, torch.Tensor) else tensor.device, copy=True)
