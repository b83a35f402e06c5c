"""Memory that a state is copied into, so that training goes on while the copy is written."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch

from runmgr.worker.memory import available_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_ALIGNMENT_BYTES = 64
_PAGE_BYTES = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU
_RESERVE_SHARE = 0.5  # what memory kept ready before the first save may take of what is free
_COPY_SHARE = 0.9
# What a kernel that has no more memory makes mmap, torch and the pinning of pages raise.
_NO_MEMORY = (OSError, MemoryError, RuntimeError)


class Staging:
    """Reused memory for one copy of a state; pinned when the state lies on a GPU.

    Touching fresh memory costs many times what a copy does, so `reserve` does it ahead of time, in a thread.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._reserving: threading.Thread | None = None

    def reserve(self, size_bytes: int, *, pinned_for: torch.device | None = None) -> None:
        """Make memory ready in the background, if less than half of what is free is needed: pinned for copies from a GPU.

        Only a head start: where the memory cannot be had after all, `copy` asks again and tells.
        """
        self.settle()
        missing = size_bytes - sum(block.size_bytes for block in self._blocks)
        if 0 < missing < _RESERVE_SHARE * available_bytes():
            self._begin_to_add(missing, pinned_for)

    def _begin_to_add(self, size_bytes: int, pinned_for: torch.device | None) -> None:
        thread = threading.Thread(target=self._add, args=(size_bytes, pinned_for), name="runmgr-staging")
        with suppress(RuntimeError):  # no more threads can be had
            thread.start()
            self._reserving = thread

    def _add(self, size_bytes: int, pinned_for: torch.device | None) -> None:
        """Make one more block, if the memory can be had."""
        with suppress(*_NO_MEMORY):
            self._blocks.append(_Block(size_bytes, pinned_for))

    def settle(self) -> None:
        """Return when no thread of ours is at work."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def release(self) -> None:
        """Give the memory back."""
        self.settle()
        self._blocks = []

    def copy(self, value: Any, private: Collection[int] = ()) -> Any | None:
        """Return `value` with every tensor copied here, sharing among themselves what they shared; None if memory is short.

        What the last copy held is overwritten. Returns when devices have finished copying. Memory that is `private`, by its
        `identity`, nobody else writes to: it is handed over as it is.
        """
        self.settle()
        storages = {identity(tensor): tensor.untyped_storage() for tensor in tensors_in(value)}
        storages = {key: storage for key, storage in storages.items() if key not in private}
        pinned_for = next((storage.device for storage in storages.values() if storage.device.type == "cuda"), None)
        if any(block.for_gpu != (pinned_for is not None) for block in self._blocks):
            self._blocks = []
        for block in self._blocks:
            block.used_bytes = 0
        placed, left = {}, []
        for key, storage in sorted(storages.items(), key=lambda item: -item[1].nbytes()):
            room = next((block for block in self._blocks if block.has_room_for(storage.nbytes())), None)
            if room is None:
                left.append((key, storage))
            else:
                placed[key] = room.take(storage.nbytes())
        if left:
            missing = sum(_aligned(storage.nbytes()) for _, storage in left)
            known = len(self._blocks)
            if missing <= _COPY_SHARE * available_bytes():
                if pinned_for is None:
                    self._add(missing, None)
                else:  # in a thread, which keeps CUDA's "last error" to itself, should the driver refuse
                    self._begin_to_add(missing, pinned_for)
                    self.settle()
            if len(self._blocks) == known:
                return None
            placed |= {key: self._blocks[-1].take(storage.nbytes()) for key, storage in left}
        _copy_all([(placed[key], storage) for key, storage in storages.items()])

        def copy_of(tensor: torch.Tensor) -> torch.Tensor:
            memory = placed.get(identity(tensor))
            return tensor if memory is None else _like(tensor, memory)

        return map_tensors(value, copy_of)


class _Block:
    """One stretch of memory, its pages already there, and pinned for a GPU; as many bytes as are asked for.

    torch's own pinned memory would be the next power of two, and stay with torch when it is given back.
    """

    def __init__(self, size_bytes: int, pinned_for: torch.device | None) -> None:
        self.size_bytes = max(size_bytes, _ALIGNMENT_BYTES)
        self.used_bytes = 0
        self.for_gpu = pinned_for is not None
        self._buffer = mmap.mmap(-1, self.size_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them: small pages do
                self._buffer.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(self._buffer, dtype=torch.uint8)[::_PAGE_BYTES] = 0  # unlike madvise, without the GIL
        if pinned_for is not None:
            self._pin(pinned_for)

    def _pin(self, device: torch.device) -> None:
        """Let the GPU copy here by itself. Where the driver refuses, copies are slower, and as good."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = torch.frombuffer(self._buffer, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):  # a new thread's is GPU 0, which need not be this rank's
            refused = int(runtime.cudaHostRegister(address, self.size_bytes, _PORTABLE))
        if not refused:
            weakref.finalize(self, _unpin, runtime, address, device).atexit = False

    def has_room_for(self, size_bytes: int) -> bool:
        return self.used_bytes + size_bytes <= self.size_bytes

    def take(self, size_bytes: int) -> torch.Tensor:
        """Return the next bytes as a tensor whose storage is just these, since torch.save writes whole storages."""
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        taken = torch.frombuffer(self._buffer, dtype=torch.uint8, count=size_bytes, offset=self.used_bytes)
        self.used_bytes += _aligned(size_bytes)
        return taken


def _unpin(runtime: Any, address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        runtime.cudaHostUnregister(address)


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
            stack.enter_context(torch.cuda.device(stream.device))  # so that leaving the stream sets GPU 0 up for nobody
            stack.enter_context(torch.cuda.stream(stream))
        for target, storage in pairs:
            target.copy_(_bytes_in(storage), non_blocking=True)
    for stream in streams.values():
        stream.synchronize()


def _bytes_in(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _like(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def identity(tensor: torch.Tensor) -> int:
    """Return what tensors have in common that share their memory."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # the storage's address; torch.save goes by it as well


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without a gradient or a pending conjugation; sparse and quantised ones are not for copying."""
    return tensor.detach().resolve_conj().resolve_neg()


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a copy of nested containers with `function` applied to every tensor in them."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return mapping_like(value, {key: map_tensors(item, function) for key, item in value.items()})
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return (list if isinstance(value, list) else tuple)(map_tensors(item, function) for item in value)
    return value


def mapping_like(source: Mapping[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Return `items` as the kind of dict that `source` is: Counter, OrderedDict or dict.

    A module's state dict carries as `_metadata` the versions that its parts were saved at, without which they would take
    it for an old one when they load it.
    """
    if isinstance(source, Counter):
        return Counter(items)
    if not isinstance(source, OrderedDict):
        return items
    found = OrderedDict(items)
    if (metadata := getattr(source, "_metadata", None)) is not None:
        found._metadata = metadata  # type: ignore[attr-defined]  # noqa: SLF001  # torch's own name for it
    return found


class OwnCopies:
    """Makes copies of tensors that share among themselves what the originals shared, and nothing else."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}

    def copy(self, value: Any) -> Any:
        """Return `value` with every tensor copied, without gradients. All the calls together are one set of copies."""
        return map_tensors(value, self._copy)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _has_own_memory(tensor):
            return tensor.detach().clone()
        found, key = _plain(tensor), identity(tensor)
        if found.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():  # resolved, so already a copy
            return found
        if key not in self._copies:  # the original is kept as well, so that no other takes its address
            self._copies[key] = tensor.untyped_storage(), _bytes_in(tensor.untyped_storage()).clone()
        return _like(found, self._copies[key][1])


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
    return all(_has_own_memory(tensor) for tensor in tensors_in(value))


def _has_own_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def ordinary(value: Any) -> Any:
    """Return `value` with its tensors detached and resolved, ready for `Staging.copy`."""
    return map_tensors(value, _plain)


def size_bytes_of(value: Any) -> int:
    """Return the bytes that torch.save writes for the tensors in `value`: each memory once, whole."""
    strided = (tensor for tensor in tensors_in(value) if tensor.layout == torch.strided)
    return sum({identity(tensor): tensor.untyped_storage().nbytes() for tensor in strided}.values())
