"""Which elements of a model's tensors this rank keeps an average of, and how all of them come together again.

==========================  ===========================================================================================
tensor                      kept by
==========================  ===========================================================================================
parameter                   all ranks: its elements, with those of the others in one row, are cut into equal stretches
floating buffer             rank 0, whole: those of data-parallel ranks differ, and rank 0's count
shard of a DTensor (FSDP2)  the rank that trains it
==========================  ===========================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from runmgr.errors import RunError
from runmgr.worker.fusing import copy_all
from runmgr.worker.state import is_sharded, local_part

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from runmgr.ranks import Ranks

_BUCKET_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
_ALIGNMENT_BYTES = 16


class Piece(NamedTuple):
    """Elements `start` to `stop` of the tensor with this number, `offset` elements into the part that a rank keeps of it."""

    part: int
    tensor: int
    start: int
    stop: int
    offset: int = 0

    def of(self, parts: list[Tensor]) -> Tensor:
        """Return these elements of a rank's parts."""
        return parts[self.part][self.offset : self.offset + self.stop - self.start]


class Layout:
    """Who keeps which elements of some tensors. The same on all ranks that hold the same model."""

    def __init__(
        self, tensors: Mapping[str, Tensor], spread: Collection[str], dtypes: Mapping[str, torch.dtype], ranks: Ranks
    ) -> None:
        """Elements of `spread` are cut into stretches of equal bytes when they have these dtypes; the rest is rank 0's."""
        self.keys = list(tensors)
        self.ranks = ranks
        self.counts = [local_part(tensor).numel() for tensor in tensors.values()]
        self._sharded = [is_sharded(tensor) for tensor in tensors.values()]
        sizes = [dtypes[key].itemsize for key in self.keys]
        row = [key in spread and not sharded for key, sharded in zip(self.keys, self._sharded, strict=True)]
        total = sum(count * size for count, size, is_in in zip(self.counts, sizes, row, strict=True) if is_in)
        self.cuts: list[list[int]] = []
        begin, world = 0, ranks.world_size
        for count, size, is_in in zip(self.counts, sizes, row, strict=True):
            if is_in:
                cuts = [min(max(-((begin - total * rank // world) // size), 0), count) for rank in range(world)]
                begin += count * size
            else:
                cuts = [0] + [count] * (world - 1)
            self.cuts.append([*cuts, count])
        self.mine = self.pieces(ranks.rank)
        self.mine += [
            Piece(len(self.mine) + place, number, 0, self.counts[number])
            for place, number in enumerate(number for number, sharded in enumerate(self._sharded) if sharded)
        ]
        self.travelling = len(self.pieces(ranks.rank))
        self.has_shards = any(self._sharded)

    def pieces(self, rank: int) -> list[Piece]:
        """Return what a rank keeps of the tensors that are no shards."""
        found: list[Piece] = []
        for number, cuts in enumerate(self.cuts):
            if not self._sharded[number] and cuts[rank] < cuts[rank + 1]:
                found.append(Piece(len(found), number, cuts[rank], cuts[rank + 1]))
        return found

    def views(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return this rank's part of each, flat: where it can be, a view of the tensor's own memory."""
        flats = [flat(local_part(tensors[key])) for key in self.keys]
        return [flats[piece.tensor][piece.start : piece.stop] for piece in self.mine]

    def share(
        self,
        fill: Callable[[list[Tensor], list[Piece]], object],
        targets: list[Tensor] | None,
        dtypes: list[torch.dtype],
        device: torch.device,
    ) -> None:
        """Bring everybody's elements into the `targets`, flat and whole, of every rank that gives some. Every rank.

        `fill` writes what lies in pieces of this rank's own to tensors of these `dtypes`. A few megabytes travel at a time; a
        shard of a DTensor does not travel.
        """
        world = self.ranks.world_size
        limit = _BUCKET_BYTES.get(device.type, _BUCKET_BYTES["cpu"])
        if world > 1:
            carrier = _carrier(device)
            for rank in range(world):
                for group in _groups(self.pieces(rank), dtypes, limit):
                    bucket, views = _bucket(group, dtypes, carrier)
                    if rank == self.ranks.rank:
                        fill(views, group)
                    dist.broadcast(bucket, src=rank)
                    if targets is not None:
                        copy_all(_slices(targets, group), views)
        staying = self.mine[self.travelling if world > 1 else 0 :]
        if targets is not None and staying:
            fill(_slices(targets, staying), staying)


def flat(tensor: Tensor) -> Tensor:
    """Return the elements in one row, in the order in which they lie in memory: a view, unless there are gaps between."""
    bare = tensor.detach()
    if is_dense(bare):
        return bare.as_strided((bare.numel(),), (1,))
    return bare.reshape(-1)


def is_dense(tensor: Tensor) -> bool:
    """Whether every element has a place of its own, without gaps between, so that `flat` is a view."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def dense_like(tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return an empty tensor whose `flat` has the order of the other's."""
    dtype, device = dtype or tensor.dtype, device or tensor.device
    return torch.empty_strided(tensor.shape, dense_stride(tensor), dtype=dtype, device=device)


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of `dense_like`."""
    return tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()


def flat_in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the elements of a tensor in one row, in the order that `flat` gives those of the other."""
    if tensor.stride() == like.stride() and is_dense(like):
        return flat(tensor)
    return flat(dense_like(like, tensor.dtype, tensor.device).copy_(tensor))


def _groups(pieces: list[Piece], dtypes: list[torch.dtype], limit_bytes: int) -> Iterator[list[Piece]]:
    """Cut pieces so that each group has `limit_bytes` at most."""
    group: list[Piece] = []
    left = limit_bytes
    for piece in pieces:
        size = dtypes[piece.tensor].itemsize
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + left // size)
            if stop > start:
                group.append(Piece(piece.part, piece.tensor, start, stop, piece.offset + start - piece.start))
                left -= _aligned((stop - start) * size)
            start = stop
            if left < max(size, _ALIGNMENT_BYTES):
                yield group
                group, left = [], limit_bytes
    if group:
        yield group


def _bucket(group: list[Piece], dtypes: list[torch.dtype], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return memory for the elements of a group, as bytes, which every backend can send, and as they are."""
    views, position = [], 0
    sizes = [(piece.stop - piece.start) * dtypes[piece.tensor].itemsize for piece in group]
    bucket = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device=device)
    for piece, size in zip(group, sizes, strict=True):
        views.append(bucket[position : position + size].view(dtypes[piece.tensor]))
        position += _aligned(size)
    return bucket, views


def _slices(targets: list[Tensor], group: list[Piece]) -> list[Tensor]:
    return [targets[piece.tensor][piece.start : piece.stop] for piece in group]


def _carrier(device: torch.device) -> torch.device:
    """Return a device whose tensors the process group can send: this one, unless the group knows only another kind."""
    if f"{device.type}:" in dist.get_backend_config():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def check_group(ranks: Ranks) -> None:
    """Raise RunError where there are several ranks and no process group to send anything over."""
    if ranks.world_size > 1 and not dist.is_initialized():
        raise RunError(
            f"{ranks.source} say that {ranks.world_size} ranks run, but there is no process group to send the average "
            f"over; call torch.distributed.init_process_group() first"
        )


def gathered_rows(row: Tensor) -> list[Tensor]:
    """Return every rank's `row`, which has the same size on all, in their order. Every rank."""
    carrier = _carrier(row.device)
    found = [torch.empty_like(row, device=carrier) for _ in range(dist.get_world_size())]
    dist.all_gather(found, row.to(carrier))
    return [other.to(row.device) for other in found]
