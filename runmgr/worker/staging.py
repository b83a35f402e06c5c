"""Memory that a state is copied into, so that training goes on while the copy is written."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ALIGNMENT_BYTES = 64
_PAGE_BYTES = 4096
_RESERVE_SHARE = 0.5  # what memory kept ready before the first save may take of what is free
_COPY_SHARE = 0.9


class Staging:
    """Reused memory for one copy of a state; pinned when the state lies on a GPU.

    Touching fresh memory costs many times what a copy does, so `reserve` does it ahead of time, in a thread.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._reserving: threading.Thread | None = None

    def reserve(self, size_bytes: int, *, pinned: bool) -> None:
        """Make memory ready in the background, if less than half of what is free is needed."""
        self.settle()
        missing = size_bytes - sum(block.size_bytes for block in self._blocks)
        if 0 < missing < _RESERVE_SHARE * available_bytes():
            self._reserving = threading.Thread(
                target=lambda: self._blocks.append(_Block(missing, pinned=pinned)), name="runmgr-staging"
            )
            self._reserving.start()

    def settle(self) -> None:
        """Return when no thread of ours is at work."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def release(self) -> None:
        """Give the memory back."""
        self.settle()
        self._blocks = []

    def copy(self, value: Any) -> Any | None:
        """Return `value` with every tensor copied here, sharing among themselves what they shared; None if memory is short.

        What the last copy held is overwritten. Returns when devices have finished copying.
        """
        self.settle()
        storages = {_identity(tensor): tensor.untyped_storage() for tensor in tensors_in(value)}
        pinned = any(storage.device.type == "cuda" for storage in storages.values())
        if any(block.is_pinned != pinned for block in self._blocks):
            self._blocks = []
        for block in self._blocks:
            block.used_bytes = 0
        placed, left = {}, []
        for identity, storage in sorted(storages.items(), key=lambda item: -item[1].nbytes()):
            room = next((block for block in self._blocks if block.has_room_for(storage.nbytes())), None)
            if room is None:
                left.append((identity, storage))
            else:
                placed[identity] = room.take(storage.nbytes())
        if left:
            missing = sum(_aligned(storage.nbytes()) for _, storage in left)
            if missing > _COPY_SHARE * available_bytes():
                return None
            block = _Block(missing, pinned=pinned)
            self._blocks.append(block)
            placed |= {identity: block.take(storage.nbytes()) for identity, storage in left}
        _copy_all([(placed[identity], storage) for identity, storage in storages.items()])
        return map_tensors(value, lambda tensor: _like(tensor, placed[_identity(tensor)]))


class _Block:
    """One stretch of memory, its pages already there."""

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.size_bytes = max(size_bytes, _ALIGNMENT_BYTES)
        self.used_bytes = 0
        self.is_pinned = pinned
        if pinned:
            self._memory: Any = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=True)
            self._buffer: Any = (ctypes.c_char * self.size_bytes).from_address(self._memory.data_ptr())
        else:
            self._buffer = mmap.mmap(-1, self.size_bytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._buffer.madvise(mmap.MADV_HUGEPAGE)
            torch.frombuffer(self._buffer, dtype=torch.uint8)[::_PAGE_BYTES] = 0  # unlike madvise, without the GIL

    def has_room_for(self, size_bytes: int) -> bool:
        return self.used_bytes + size_bytes <= self.size_bytes

    def take(self, size_bytes: int) -> torch.Tensor:
        """Return the next bytes as a tensor whose storage is just these, since torch.save writes whole storages."""
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8)
        taken = torch.frombuffer(self._buffer, dtype=torch.uint8, count=size_bytes, offset=self.used_bytes)
        self.used_bytes += _aligned(size_bytes)
        return taken


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _copy_all(pairs: list[tuple[torch.Tensor, torch.UntypedStorage]]) -> None:
    """Copy storages byte for byte; from a GPU on a stream of its own, after what was queued there."""
    streams = {}
    for device in {storage.device for _, storage in pairs if storage.device.type == "cuda"}:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams[device].wait_stream(torch.cuda.current_stream(device))
    with ExitStack() as stack:
        for stream in streams.values():
            stack.enter_context(torch.cuda.stream(stream))
        for target, storage in pairs:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            target.copy_(source, non_blocking=True)
    for stream in streams.values():
        stream.synchronize()


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(target.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # the storage's address; torch.save goes by it as well


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without a gradient or a pending conjugation; sparse and quantised ones are not for copying."""
    return tensor.detach().resolve_conj().resolve_neg()


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a copy of nested containers with `function` applied to every tensor in them."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, function) for key, item in value.items()}
        return type(value)(items) if isinstance(value, (OrderedDict, Counter)) else items
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([map_tensors(item, function) for item in value])
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def can_stage(value: Any) -> bool:
    """Whether all tensors are ordinary ones, with a memory of their own."""
    return all(tensor.layout == torch.strided and not tensor.is_quantized for tensor in tensors_in(value))


def ordinary(value: Any) -> Any:
    """Return `value` with its tensors detached and resolved, ready for `Staging.copy`."""
    return map_tensors(value, _plain)


def size_bytes_of(value: Any) -> int:
    """Return the bytes that torch.save writes for the tensors in `value`: each memory once, whole."""
    strided = (tensor for tensor in tensors_in(value) if tensor.layout == torch.strided)
    return sum({_identity(tensor): tensor.untyped_storage().nbytes() for tensor in strided}.values())


def available_bytes() -> int:
    """Return the memory that this process can still use, by the kernel's estimate and its control group's limit."""
    free = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):  # not Linux: nothing known, nothing refused
        return 1 << 62
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(statistics["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no limit
        pass
    return min(free)
