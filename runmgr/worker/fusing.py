"""Arithmetic on many tensors at once, in the accumulator's precision, at the speed of memory."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from runmgr.worker.sharding import Piece

_logger = logging.getLogger("runmgr.average")
# What is worked on at a time stays in the processor's cache, and gives all of torch's threads work; on a GPU, in the device's.
_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
# The kernels for many tensors give each 65,536 elements to one of a GPU's processors, so a block keeps few of them at work.
# From so many elements on a kernel for one tensor, which uses all, is worth its launch.
_ALONE = {"cuda": 1 << 20}
_ALIGNED = 64  # elements: there a GPU reads several at once


def _block_bytes(place: str) -> int:
    return _BLOCK_BYTES["cuda" if place == "cuda" else "cpu"]


def _aligned(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED


def _laid_out(memory: Tensor, lengths: list[int]) -> list[Tensor]:
    """Return tensors of these lengths from a memory, each at an aligned place."""
    sizes = [size for length in lengths for size in (length, _aligned(length) - length)]
    return list(torch.split(memory[: sum(sizes)], sizes))[::2]


class Pairing:
    """Flat tensors and the flat tensors, of the same sizes and maybe of another dtype, that are to change them.

    Made once for the same memory.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        self._alone: list[tuple[Tensor, Tensor]] = []
        self._alike: dict[_Kind, tuple[list[Tensor], list[Tensor]]] = {}
        self._blocks: list[_Block] = []
        blocks: dict[_Kind, _Block] = {}
        for target, source in zip(targets, sources, strict=True):
            kind = _Kind(target.device, target.dtype, source.device, source.dtype)
            is_local = kind.device == kind.source
            is_simple = is_local and kind.source_dtype.itemsize > 1  # nothing promotes float8
            if is_simple and len(target) >= _ALONE.get(kind.device.type, math.inf):
                length = _block_bytes(kind.device.type) // kind.dtype.itemsize
                self._alone += zip(torch.split(target, length), torch.split(source, length), strict=True)
                continue
            if is_local and kind.dtype == kind.source_dtype:
                alike = self._alike.setdefault(kind, ([], []))
                alike[0].append(target)
                alike[1].append(source)
                continue
            start = 0
            while start < len(target):
                block = blocks.get(kind)
                if block is None or not block.room:
                    block = blocks[kind] = _Block(kind)
                    self._blocks.append(block)
                stop = min(start + block.room, len(target))
                block.add(target[start:stop], source[start:stop])
                start = stop

    def apply(
        self, change: Callable[[list[Tensor], list[Tensor]], object], one: Callable[[Tensor, Tensor], object]
    ) -> None:
        """Change the targets by the sources.

        `change` does so with lists, each of one dtype and device: the `torch._foreach_` functions do, which have no public
        name. `one` does it with two tensors, maybe of two dtypes.
        """
        for pair in self._alone:
            one(*pair)
        for alike in self._alike.values():
            change(*alike)
        memory: dict[_Kind, Tensor] = {}
        for block in self._blocks:
            if block.kind not in memory:  # the first block of its kind is the fullest
                memory[block.kind] = block.scratch()
            converted = _laid_out(memory[block.kind], block.lengths)
            torch._foreach_copy_(converted, block.sources)
            change(block.targets, converted)


class _Kind(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    source: torch.device
    source_dtype: torch.dtype


class _Block:
    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        place = kind.device if kind.device == kind.source else torch.device("cuda")
        self.room = _aligned(_block_bytes(place.type) // kind.dtype.itemsize)
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.lengths: list[int] = []

    def scratch(self) -> Tensor:
        """Return memory for what is converted; pinned where it comes from a GPU to the host."""
        pin = self.kind.device.type == "cpu" and self.kind.source.type == "cuda"
        return torch.empty(
            sum(map(_aligned, self.lengths)), dtype=self.kind.dtype, device=self.kind.device, pin_memory=pin
        )

    def add(self, target: Tensor, source: Tensor) -> None:
        self.targets.append(target)
        self.sources.append(source)
        self.lengths.append(len(target))
        self.room -= _aligned(len(target))


class ExactSum:
    """Sums of which nothing is lost that a later subtraction could lay bare: float64, and beside it what it rounded off.

    Knuth's two-sum (The Art of Computer Programming, volume 2, 4.2.2, theorem B); the rests are added up in single precision.
    """

    def __init__(self, like: list[Tensor], dtypes: list[torch.dtype]) -> None:
        self._sums = empty_parts(like, dtypes)
        self._rests = empty_parts(like, [torch.complex64 if dtype.is_complex else torch.float32 for dtype in dtypes])
        set_zero(self._sums)
        set_zero(self._rests)

    @torch.no_grad()
    def add(self, values: list[Tensor], sign: int = 1) -> None:
        """Add flat tensors of any precision, or with sign -1 subtract them."""
        scratch = _Scratch()
        for group in _cut(self._sums, values):
            sums, rests, given = (_places(parts, group) for parts in (self._sums, self._rests, values))
            new, old = scratch.copies(0, given, sums), scratch.copies(1, sums, sums)
            if sign < 0:
                torch._foreach_neg_(new)
            torch._foreach_add_(sums, new)
            taken = scratch.copies(2, sums, sums)
            torch._foreach_sub_(taken, old)  # what came in of the new ones
            torch._foreach_sub_(new, taken)
            torch._foreach_sub_(taken, sums)
            torch._foreach_add_(taken, old)
            torch._foreach_add_(new, taken)  # (new - taken) + (old - (sums - taken))
            torch._foreach_add_(rests, scratch.copies(3, new, rests))

    def mean_into(self, targets: list[Tensor], pieces: list[Piece], count: int) -> None:
        """Write the sums of some elements, divided, to tensors of their own dtypes."""
        sums, rests = ([piece.of(parts) for piece in pieces] for parts in (self._sums, self._rests))
        scratch = _Scratch()
        for group in _cut(sums, targets):
            total = scratch.copies(0, _places(rests, group), _places(sums, group))
            torch._foreach_add_(total, _places(sums, group))
            _divide(total, count)
            copy_all(_places(targets, group), total)


def quotients_into(targets: list[Tensor], sums: list[Tensor], count: int) -> None:
    """Write sums, divided, to flat tensors of other dtypes."""
    scratch = _Scratch()
    for group in _cut(sums, targets):
        found = scratch.copies(0, _places(sums, group), _places(sums, group))
        _divide(found, count)
        copy_all(_places(targets, group), found)


class _Scratch:
    """Memory for one block, used again for the next: on a CPU touching fresh memory costs many times what a copy does."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def copies(self, name: int, values: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        """Return copies of the values, in the dtypes and on the devices of the others; the same name, the same memory."""
        found, used = [], dict.fromkeys([(part.device, part.dtype) for part in like], 0)
        for part in like:
            kind = part.device, part.dtype
            key = (name, *kind)
            if key not in self._memory or len(self._memory[key]) < used[kind] + len(part):
                needed = sum(_aligned(len(other)) for other in like if (other.device, other.dtype) == kind)
                self._memory[key] = torch.empty(needed, dtype=part.dtype, device=part.device)
            found.append(self._memory[key][used[kind] : used[kind] + len(part)])
            used[kind] += _aligned(len(part))
        copy_all(found, values)
        return found


def _places(parts: list[Tensor], group: list[tuple[int, slice]]) -> list[Tensor]:
    return [parts[number][place] for number, place in group]


def _cut(parts: list[Tensor], others: list[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """Cut flat tensors, which are to meet others, into groups of a block's size."""
    place = "cuda" if any(part.is_cuda for part in [*parts, *others]) else "cpu"
    size = room = _block_bytes(place) // torch.float64.itemsize
    group: list[tuple[int, slice]] = []
    for number, part in enumerate(parts):
        start = 0
        while start < len(part):
            stop = min(start + room, len(part))
            group.append((number, slice(start, stop)))
            room, start = room - (stop - start), stop
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into others of the same sizes; there may be none.

    Those of one kind at a time: up to torch 2.10 a list of several dtypes is written on a GPU as if all had the first one's.
    """
    kinds: dict[_Kind, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        kind = _Kind(target.device, target.dtype, source.device, source.dtype)
        alike = kinds.setdefault(kind, ([], []))
        alike[0].append(target)
        alike[1].append(source)
    for alike in kinds.values():
        torch._foreach_copy_(*alike)


def set_zero(targets: list[Tensor]) -> None:
    """Set tensors to zero; there may be none."""
    if targets:
        torch._foreach_zero_(targets)


def copied_if_finite(targets: list[Tensor], sources: list[Tensor]) -> bool:
    """Copy flat tensors, and say whether all of it is finite; on a CPU what is looked at is still in its cache."""
    if all(source.device.type == "cpu" for source in sources):
        return all(map(_copied_if_finite, targets, sources))
    copy_all(targets, sources)
    filled = [source for source in sources if len(source)]
    norms = torch._foreach_norm(filled, float("inf")) if filled else ()
    return all(bool(torch.stack(alike).isfinite().all()) for alike in _by_kind(norms))


def _divide(tensors: list[Tensor], count: int) -> None:
    """Divide tensors. Those of one kind at a time: else a GPU multiplies by the reciprocal, which may round otherwise."""
    for alike in _by_kind(tensors):
        torch._foreach_div_(alike, count)


def _by_kind(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return found.values()


def _copied_if_finite(target: Tensor, source: Tensor) -> bool:
    length = _block_bytes("cpu") // source.element_size()
    sums = []
    for to, part in zip(torch.split(target, length), torch.split(source, length), strict=True):
        to.copy_(part)
        sums.append(to.sum())
    if not sums or bool(torch.stack(sums).isfinite().all()):  # NaN and infinity make their sum one of them
        return True
    return bool(source.isfinite().all())  # or finite values summed to more than the dtype holds


def empty_parts(views: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Return a flat tensor for each view, of these dtypes, on its device, all those of one kind in one memory.

    Where the device has no room it is host memory.
    """
    kinds = [(view.device, dtype) for view, dtype in zip(views, dtypes, strict=True)]
    parts: list[Tensor | None] = [None] * len(views)
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        lengths = [len(views[place]) for place in places]
        memory = _memory(sum(map(_aligned, lengths)), kind[1], kind[0])
        for place, part in zip(places, _laid_out(memory, lengths), strict=True):
            parts[place] = part
    return [part for part in parts if part is not None]


def _memory(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.empty(length, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        _logger.warning(
            "%s has no room for %.1f MB of an average; they are kept in host memory",
            device,
            length * dtype.itemsize / 1e6,
        )
        return torch.empty(length, dtype=dtype, device="cpu")
