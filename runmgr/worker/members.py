"""The members of a best-k average: a rank's part of their weights in memory, until a checkpoint holds them, then its file."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from runmgr.disk import integrity
from runmgr.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from runmgr.worker.source import Source

_COMPARED_BYTES = 64 << 20
_THREADS = 2  # two read as fast as memory gives


@dataclass(eq=False)
class Member:
    """One state of the model. `weights` are this rank's part, flat; `others`, on rank 0, what is not averaged."""

    metric: float
    number: int
    weights: list[Tensor] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    object_name: str | None = None
    key: str = "net"
    path: Path | None = None

    def parts(self, source: Source) -> list[Tensor]:
        """Return this rank's part of the weights: what lies in a file as its pages, after a check of what was read."""
        if self.weights is not None:
            return self.weights
        content = self._content()
        read = [content[source.layout.keys[piece.tensor]] for piece in source.layout.mine]
        storages = {tensor.untyped_storage().data_ptr(): _bytes_under(tensor) for tensor in read}
        integrity.check_records(self._file(), list(storages.values()))
        return source.parts_of(content)

    def newest_others(self, keys: list[str]) -> Mapping[str, Any]:
        """Return what is not averaged."""
        if self.weights is not None:
            return self.others
        content = self._content()
        return {key: content[key] for key in keys}

    def _file(self) -> Path:
        if self.path is None:
            raise RunError(
                f"the member {self.object_name} of the average has no file; restore it through Run.restore()"
            )
        return self.path

    def _content(self) -> Mapping[str, Any]:
        from runmgr.worker.loading import load_file

        content = load_file(self._file(), mmap=True)[self.key]
        if isinstance(members := content.get("members"), list):  # the average's own entry
            content = next(entry["weights"] for entry in members if entry["number"] == self.number)
        if isinstance(averages := content.get("averages"), dict):  # an ExponentialAverage's
            content = averages | content["others"]
        return cast("Mapping[str, Any]", content)


def are_same_bits(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether flat tensors hold the same, bit for bit."""
    if any(tensor.is_cuda for tensor in (*some, *others)):
        return all(map(same_bits, some, others))
    with ThreadPoolExecutor(_THREADS) as pool:
        return all(pool.map(same_bits, some, others))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, bit for bit: NaN is itself, and the zeros differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.numel() == 0:
        return True
    one_bytes, other_bytes = _bytes_of(one), _bytes_of(other.to(one.device))
    if one.device.type != "cpu":  # where comparing takes as much memory as is compared
        return all(map(torch.equal, torch.split(one_bytes, _COMPARED_BYTES), torch.split(other_bytes, _COMPARED_BYTES)))
    return bool(
        _memcmp()(one_bytes.data_ptr(), other_bytes.data_ptr(), one_bytes.numel()) == 0
    )  # ten times torch.equal


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _bytes_under(tensor: Tensor) -> memoryview:
    storage = tensor.untyped_storage()
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr()))


@functools.cache
def _memcmp() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return function
