"""The mean of tensors that lie in files, piece by piece: threads read, check and add, and no tensor is ever held whole."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from runmgr.disk import integrity
from runmgr.disk.tensors import StoredTensor
from runmgr.errors import InvalidInput
from runmgr.worker.staging import mapping_like

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from runmgr.disk.tensors import TensorFile

_PIECE = 1 << 18  # elements, so that their float64 sums still lie in a processor's cache
_THREADS = 4  # as many reads under way
_AHEAD = 2  # results that wait, for each thread
_ALIGNMENT_BYTES = 64
_SHOWN = 10


class Stretch(NamedTuple):
    """What is averaged element by element: `numel` elements that all members hold in one order.

    `is_flat` says that each has them on end from its `start`; else layouts differ, and they are read as whole tensors.
    """

    key: str
    dtype: torch.dtype
    stored: tuple[StoredTensor, ...]
    numel: int
    is_flat: bool

    @property
    def is_averaged(self) -> bool:
        """Whether it has a mean; of others the newest member's counts."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    def readers(self) -> Sequence[int]:
        """Return the numbers of the members that are read."""
        return range(len(self.stored)) if self.is_averaged else [len(self.stored) - 1]

    def covers(self, record: integrity.Record, member: int) -> bool:
        """Whether a member's record holds these elements and nothing else, so that reading them reads all of it."""
        stored = self.stored[member]
        return stored.start == 0 and stored.span * self.dtype.itemsize == record.size_bytes


class _Piece(NamedTuple):
    stretch: Stretch
    start: int
    numel: int

    def size_bytes(self, member: int) -> int:
        count = self.numel if self.stretch.is_flat else self.stretch.stored[member].span
        return count * self.stretch.dtype.itemsize


class _Blended(NamedTuple):
    piece: _Piece
    content: memoryview
    crcs: list[int]


class Blend:
    """The mean of the same state dict from several open files, the newest last.

    `net` is that state dict with tensors of the right shape and sharing, but without content: `pieces` yields that, in
    the order in which torch.save asks for it. Tensors are summed in float64; integer and boolean ones are the newest's.
    """

    def __init__(self, files: Sequence[TensorFile], weights: Sequence[Mapping[str, Any]]) -> None:
        _check_alike(files, weights)
        self._files = files
        self._stretches: dict[Any, Stretch] = {}
        places: dict[str, Any] = {}
        for key, value in weights[-1].items():
            if isinstance(value, StoredTensor):
                self._check_records(stored := tuple(held[key] for held in weights))
                places[key] = self._place(key, stored)
            elif _is_plain(value):  # extra state of a module
                places[key] = value
            else:
                raise InvalidInput(f"{files[-1].path}: {key!r} is neither a plain tensor nor a plain value")
        self.net = mapping_like(weights[-1], self._empty_tensors(weights[-1], places))
        pieces = [_Piece(stretch, 0, stretch.numel) for stretch in self._stretches.values()]
        self.read_bytes = sum(piece.size_bytes(member) for piece in pieces for member in piece.stretch.readers())
        self.size_bytes = sum(piece.stretch.numel * piece.stretch.dtype.itemsize for piece in pieces)

    def pieces(self, device: torch.device, on_bytes: Callable[[int], object]) -> Generator[memoryview]:
        """Yield the bytes of the mean.

        Raises CheckpointCorrupt for a member whose bytes changed since it was saved, and InvalidInput for one that holds
        values that are not finite where others' are. `on_bytes` hears, in this thread, how many bytes were read. Several
        of torch's operations are under way at a time, so each uses one thread; the setting is put back at the end.
        """
        threads_before = torch.get_num_threads()
        adder = _Adder(self._files, device)
        crcs: dict[tuple[int, str], tuple[int, int]] = {}
        waiting: deque[Any] = deque()
        pool = ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,))
        try:
            list(pool.map(lambda part: part[0].check(part[1]), self._partly_read()))
            for batch in _batches(self._stretches.values()):
                waiting.append(pool.submit(lambda pieces: [adder.blended(piece) for piece in pieces], batch))
                if len(waiting) > _AHEAD * _THREADS:
                    yield from self._checked(waiting.popleft().result(), crcs, on_bytes)
            while waiting:
                yield from self._checked(waiting.popleft().result(), crcs, on_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_before)

    def _place(self, key: str, stored: tuple[StoredTensor, ...]) -> Any:
        """Find or make the stretch of one tensor; those that share their memory in all members are one."""
        newest = stored[-1]
        dtype = getattr(torch, newest.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InvalidInput(f"{key!r} is of the dtype {newest.dtype}, which torch {torch.__version__} does not have")
        is_flat = all(one.is_dense and one.stride == newest.stride for one in stored)
        place = (*((one.record, one.start, one.numel) for one in stored), "" if is_flat else key)
        self._stretches.setdefault(place, Stretch(key, dtype, stored, newest.numel, is_flat))
        return place

    def _empty_tensors(self, weights: Mapping[str, Any], places: dict[str, Any]) -> dict[str, Any]:
        """Return tensors for the stretches, all in one memory that nobody touches; each has a storage of its own."""
        sizes = [stretch.numel * stretch.dtype.itemsize for stretch in self._stretches.values()]
        memory = mmap.mmap(-1, max(sizes, default=0) + _ALIGNMENT_BYTES * (len(sizes) + 1))
        flat = {
            place: torch.frombuffer(memory, dtype=stretch.dtype, count=stretch.numel, offset=_ALIGNMENT_BYTES * number)
            if stretch.numel
            else torch.empty(0, dtype=stretch.dtype, device="cpu")
            for number, (place, stretch) in enumerate(self._stretches.items())
        }
        found = {}
        for key, place in places.items():
            if not isinstance(value := weights[key], StoredTensor):
                found[key] = place
            elif self._stretches[place].is_flat and value.numel:
                found[key] = flat[place].as_strided(value.shape, value.stride)
            else:
                found[key] = flat[place].reshape(value.shape)
        return found

    def _check_records(self, stored: tuple[StoredTensor, ...]) -> None:
        for file, one in zip(self._files, stored, strict=True):
            if one.record not in file.records:
                raise integrity.damaged(file.path, f"the record {one.record!r} is missing")

    def _partly_read(self) -> list[tuple[TensorFile, str]]:
        """Return the records of which only a part is averaged: they are checked on their own."""
        found = {}
        for stretch in self._stretches.values():
            for member in stretch.readers():
                file, record = self._files[member], stretch.stored[member].record
                if not stretch.covers(file.records[record], member):
                    found[member, record] = file, record
        return list(found.values())

    def _checked(
        self, blended: list[_Blended], crcs: dict[tuple[int, str], tuple[int, int]], on_bytes: Callable[[int], object]
    ) -> Iterator[memoryview]:
        """Yield what was blended once the CRC of each record that ended with it is known to be right."""
        for piece, content, found in blended:
            for member, crc in zip(piece.stretch.readers(), found, strict=True):
                file, size_bytes = self._files[member], piece.size_bytes(member)
                entry = file.records[piece.stretch.stored[member].record]
                before, done = crcs.pop((member, piece.stretch.key), (0, 0))
                joined, done = integrity.joined_crc(before, crc, size_bytes), done + size_bytes
                if done < entry.size_bytes:
                    crcs[member, piece.stretch.key] = joined, done
                elif file.has_crcs and piece.stretch.covers(entry, member) and joined != entry.crc:
                    raise integrity.wrong_crc(file.path, entry)
                on_bytes(size_bytes)
            yield content


class _Adder(threading.local):
    """One thread's memory, used again for every piece: what is read, the float64 sum, and a member made float64."""

    def __init__(self, files: Sequence[TensorFile], device: torch.device) -> None:
        self._files = files
        self._device = device
        self._raw = bytearray()
        self._wide: dict[tuple[str, torch.dtype], Tensor] = {}

    def blended(self, piece: _Piece) -> _Blended:
        """Return the mean of one piece, and the CRC of what was read of each member."""
        stretch = piece.stretch
        result = memoryview(bytearray(piece.numel * stretch.dtype.itemsize))
        if not stretch.is_averaged and stretch.is_flat:
            return _Blended(piece, result, [self._fill(result, piece, stretch.readers()[0])])
        if not stretch.is_averaged:
            values, crc = self._values(piece, stretch.readers()[0])
            torch.frombuffer(result, dtype=stretch.dtype).copy_(values.reshape(-1))
            return _Blended(piece, result, [crc])
        wide = torch.complex128 if stretch.dtype.is_complex else torch.float64
        total, addend = self._room("total", wide, piece).zero_(), self._room("addend", wide, piece)
        crcs = []
        for member in stretch.readers():
            values, crc = self._values(piece, member)
            addend.copy_(_quick_to_widen(values).to(self._device))  # two passes are faster than one of mixed dtypes
            total.add_(addend)
            crcs.append(crc)
        if not total.sum().isfinite():
            self._check_finite(piece)
        torch._foreach_div_([total], len(crcs))  # a GPU's div_ multiplies by the reciprocal
        torch.frombuffer(result, dtype=stretch.dtype).copy_(total.to(stretch.dtype).reshape(-1))
        return _Blended(piece, result, crcs)

    def _room(self, name: str, dtype: torch.dtype, piece: _Piece) -> Tensor:
        """Return reused memory in the shape of the piece."""
        found = self._wide.get((name, dtype))
        if found is None or found.numel() < piece.numel:
            found = self._wide[name, dtype] = torch.empty(piece.numel, dtype=dtype, device=self._device)
        found = found[: piece.numel]
        return found if piece.stretch.is_flat else found.view(piece.stretch.stored[-1].shape)

    def _values(self, piece: _Piece, member: int) -> tuple[Tensor, int]:
        """Read one member's piece into memory that the next call overwrites; returns its CRC as well."""
        size_bytes = piece.size_bytes(member)
        if len(self._raw) < size_bytes:
            self._raw = bytearray(size_bytes)
        crc = self._fill(memoryview(self._raw)[:size_bytes], piece, member)
        dtype, stored = piece.stretch.dtype, piece.stretch.stored[member]
        values = torch.frombuffer(self._raw, dtype=dtype, count=size_bytes // dtype.itemsize)
        return values if piece.stretch.is_flat else values.as_strided(stored.shape, stored.stride), crc

    def _fill(self, buffer: memoryview, piece: _Piece, member: int) -> int:
        stored = piece.stretch.stored[member]
        start = (stored.start + piece.start) * piece.stretch.dtype.itemsize
        return self._files[member].read(stored.record, start, buffer)

    def _check_finite(self, piece: _Piece) -> None:
        """Refuse NaN, and an infinity that not all members have, as all have one in a mask."""
        members = piece.stretch.readers()
        infinite = [~self._values(piece, member)[0].isfinite() for member in members]
        for member, mask in zip(members, infinite, strict=True):
            values = self._values(piece, member)[0]
            if bool(values.isnan().any()) or any(not torch.equal(mask, other) for other in infinite if mask.any()):
                self._files[member].check(piece.stretch.stored[member].record)  # damage would be the better reason
                raise InvalidInput(
                    f"{self._files[member].path} holds values that are not finite in {piece.stretch.key!r}; leave it out"
                )


def _quick_to_widen(values: Tensor) -> Tensor:
    """Return half precision as single: on a CPU the two steps to float64 take a third of the time that one takes."""
    return values.float() if values.dtype == torch.float16 else values


def _batches(stretches: Iterable[Stretch]) -> Iterator[list[_Piece]]:
    """Cut the stretches into jobs of about one piece; torch asks for no bytes of an empty tensor."""
    batch: list[_Piece] = []
    elements = 0
    for stretch in stretches:
        step = _PIECE if stretch.is_flat else max(stretch.numel, 1)
        for start in range(0, stretch.numel, step):
            batch.append(piece := _Piece(stretch, start, min(step, stretch.numel - start)))
            elements += piece.numel
            if elements >= _PIECE:
                yield batch
                batch, elements = [], 0
    if batch:
        yield batch


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        is_known = not isinstance(value, integrity.Inert)
        return is_known and all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return not isinstance(value, StoredTensor) and all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _check_alike(files: Sequence[TensorFile], weights: Sequence[Mapping[str, Any]]) -> None:
    """Raise one InvalidInput that lists the keys whose shape or dtype is not the same in all members."""
    keys = dict.fromkeys(key for held in reversed(weights) for key in held)
    problems = [problem for key in keys if (problem := _difference(key, files, weights))]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more keys" if len(problems) > _SHOWN else ""
        raise InvalidInput(
            f"the {len(files)} members do not hold the same model: {'; '.join(problems[:_SHOWN])}{more}. Average "
            f"checkpoints of one architecture."
        )


def _difference(key: str, files: Sequence[TensorFile], weights: Sequence[Mapping[str, Any]]) -> str | None:
    holders: dict[str, list[str]] = {}
    for file, held in zip(files, weights, strict=True):
        holders.setdefault(_described(held, key), []).append(str(file.path))
    if len(holders) == 1:
        return None
    parts = (
        f"{what} in {paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
        for what, paths in holders.items()
    )
    return f"{key!r} is {', '.join(parts)}"


def _described(weights: Mapping[str, Any], key: str) -> str:
    if key not in weights:
        return "missing"
    value = weights[key]
    return f"{value.dtype} {value.shape}" if isinstance(value, StoredTensor) else "no tensor"


def device_named(name: str) -> torch.device:
    """Return a device that this machine can sum float64 on; raises InvalidInput."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise InvalidInput(f"device={name!r}: give 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInput(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use 'cpu'")
    if device.type == "cuda" and ":" not in name:
        return torch.device("cuda", torch.cuda.current_device())  # which is another one in each new thread
    return device
