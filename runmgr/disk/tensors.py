"""The tensors in a file that torch.save wrote: what they are, and where their bytes lie. Never imports torch.

Only the table of contents and the pickle are read, and nothing that the pickle names is run. So a file of any size can be
looked into, also one whose other parts `torch.load(weights_only=True)` would refuse.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from runmgr.disk import integrity
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    from runmgr.disk.integrity import Record

# torch names a storage by a class of its own for each of its older dtypes; newer ones lie in an UntypedStorage.
_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
}  # fmt: skip
_DTYPE = re.compile(r"(b?float|u?int|complex)\d\w*|bool")
_SHOWN = 10


class StoredTensor(NamedTuple):
    """A tensor of a file: torch's name of its dtype, its layout in elements, the record that its memory was written to."""

    dtype: str
    record: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """How many elements of its memory lie between its first and its last, both included."""
        if not self.numel:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether it fills its memory without gaps or overlaps, in whatever order of its dimensions."""
        reached = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size != 1 and stride != reached:
                return False
            reached *= size
        return True


class TensorFile:
    """An open file that torch.save wrote. `content` is what was saved, with a StoredTensor in each tensor's place.

    Objects other than numbers, texts, lists and dicts are `integrity.Inert`. Threads may read at the same time. The file
    may be removed meanwhile, as retention does: what is open stays readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with integrity.damage_named(path):
            self._file = path.open("rb", buffering=0)
            try:
                self._check_kind()
                self.records: dict[str, Record] = {entry.name: entry for entry in integrity.records_in(self._file)}
                self.has_crcs = any(entry.crc for entry in self.records.values())
                self.content = self._unpickled()
                self.digest = integrity.digest_of(self._file)
                found = os.fstat(self._file.fileno())
            except BaseException:
                self._file.close()
                raise
        self.size_bytes = found.st_size
        # What two names of one checkpoint have in common; without CRCs the digest does not tell contents apart.
        self.identity = (self.size_bytes, self.digest) if self.has_crcs else (found.st_dev, found.st_ino)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def read(self, record: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with a record's bytes from its `start`-th on and return their CRC-32.

        Raises CheckpointCorrupt where the record ends too early, or OSError.
        """
        entry = self.records[record]
        with integrity.damage_named(self.path):
            if start + len(buffer) > entry.size_bytes:
                raise EOFError(f"the record {record!r} ends too early")
            position, left = entry.start + start, buffer
            while left:
                count = os.preadv(self._file.fileno(), [left], position)
                if not count:
                    raise EOFError("it ends too early")
                left, position = left[count:], position + count
        return integrity.crc_of_bytes(buffer)

    def check(self, record: str) -> None:
        """Read a whole record and raise CheckpointCorrupt unless its CRC-32 is right."""
        entry = self.records[record]
        with integrity.damage_named(self.path):
            if self.has_crcs and integrity.crc_of(self._file, entry) != entry.crc:
                raise integrity.wrong_crc(self.path, entry)

    def weights(self, key: str | None = None) -> dict[str, Any]:
        """Return the model's state dict: what was saved as `key`; without it "net", the whole file, or the only one in it.

        Raises InvalidInput naming the state dicts that there are.
        """
        there: dict[str, dict[str, Any]] = {
            str(name): value
            for name, value in self.content.items()
            if _holds_tensors(value) and not str(name).endswith("_extra_state")
        }
        chosen = "net" if key is None else key
        if chosen in there:
            return there[chosen]
        if key is None and len(there) == 1:
            return next(iter(there.values()))
        if key is None and not there and _holds_tensors(self.content):
            return self.content
        names = ", ".join(f"{name!r}" for name in list(there)[:_SHOWN])
        found = f"it has {names}; choose with --key (key=…)" if there else "it has none"
        if not there and _holds_tensors(self.content):
            found = "the file is a state dict itself; leave the key out"
        raise InvalidInput(f"{self.path} has no state dict {chosen!r}: {found}")

    def _check_kind(self) -> None:
        if self._file.read(2) != b"PK":
            raise InvalidInput(
                f"{self.path} is no file of torch.save, or one in the format that torch had before 1.6; load it with "
                f"torch.load and save it anew"
            )

    def _unpickled(self) -> dict[Any, Any]:
        name = next((name for name in self.records if name.endswith("data.pkl")), None)
        if name is None:
            raise integrity.damaged(self.path, "it holds no data.pkl, so torch.save did not write it")
        self.check(name)
        folder = name.removesuffix("data.pkl")
        order = self._bytes_of(f"{folder}byteorder") or sys.byteorder.encode()
        if order != sys.byteorder.encode():
            raise InvalidInput(
                f"{self.path} was saved on a {order.decode()}-endian machine; load and save it anew here"
            )
        try:
            found = _Unpickler(io.BytesIO(self._bytes_of(name)), folder).load()
        except (pickle.UnpicklingError, AttributeError, TypeError, IndexError, KeyError) as error:
            raise integrity.damaged(self.path, f"its data.pkl cannot be read: {error}") from error
        return found if isinstance(found, dict) else {}

    def _bytes_of(self, record: str) -> bytes:
        if record not in self.records:
            return b""
        buffer = bytearray(self.records[record].size_bytes)
        self.read(record, 0, memoryview(buffer))
        return bytes(buffer)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, StoredTensor) for item in value.values())


class _Storage(NamedTuple):
    dtype: str
    record: str


class _Unpickler(integrity.PlainUnpickler):
    """Knows the functions by which torch makes tensors anew; where they are plain, they become a StoredTensor."""

    def __init__(self, file: io.BytesIO, folder: str) -> None:
        super().__init__(file)
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module == "torch" and (name in _DTYPES or _DTYPE.fullmatch(name)):
            return _DTYPES.get(name, name)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, number, *_ = pid
        return (
            _Storage(dtype if isinstance(dtype, str) else "", f"{self._folder}data/{number}")
            if kind == "storage"
            else None
        )


def _tensor(storage: Any, start: int, shape: Any, stride: Any, *more: Any) -> Any:
    """Take what `torch._utils._rebuild_tensor_v2` does: then requires_grad, hooks and, for lazy conjugates, metadata."""
    numbers = (start, *shape, *stride)
    if not isinstance(storage, _Storage) or not storage.dtype or any(more[2:]):
        return integrity.Inert()
    if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise pickle.UnpicklingError(f"there is no tensor of shape {shape!r} and stride {stride!r}")
    return StoredTensor(storage.dtype, storage.record, start, tuple(shape), tuple(stride))


def _tensor_of_new_dtype(storage: Any, start: int, shape: Any, stride: Any, *more: Any) -> Any:
    """Take what `torch._utils._rebuild_tensor_v3` does: the dtype comes before the metadata."""
    grad, hooks, dtype, *metadata = more
    if not isinstance(storage, _Storage) or not isinstance(dtype, str):
        return integrity.Inert()
    return _tensor(storage._replace(dtype=dtype), start, shape, stride, grad, hooks, *metadata)


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_new_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, _type, given, _state: function(*given),
}
