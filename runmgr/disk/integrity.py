"""Whether a checkpoint file holds, bit for bit, what was saved, and what it says of itself. Never imports torch.

`torch.save` writes a zip whose table of contents has a place for a CRC-32 of each record, which `RecordStream` fills. The
digest pins everything outside the records (the table, headers, padding), so digest and CRCs together cover every byte.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from runmgr.disk import atomic
from runmgr.disk.atomic import naming
from runmgr.errors import CheckpointCorrupt, RunError

try:
    from zlib_ng.zlib_ng import crc32  # three to four times as fast
except ImportError:  # a platform that it has no wheels for
    from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import FileIO
    from pathlib import Path

_CHUNK_BYTES = 1 << 20
_THREADS = 4
_LOCAL_HEADER_BYTES = 30
_LENGTHS = struct.Struct("<HH")  # of the name and the extra field, the last four bytes of a local header
# Where PKWARE's APPNOTE 4.3.9 and 4.3.12 put them: the CRC in a data descriptor; the CRC, and the lengths of name, extra
# field and comment, in an entry of the table, whose fixed part has 46 bytes.
_CRC, _CRC_IN_DESCRIPTOR, _CRC_IN_ENTRY = struct.Struct("<L"), 4, 16
_ENTRY_BYTES, _LENGTHS_IN_ENTRY, _ENTRY_LENGTHS = 46, 28, struct.Struct("<3H")
_HAS_DESCRIPTOR = 8  # a flag


class Record(NamedTuple):
    """One record of the zip: where its bytes lie, and their CRC-32 as the table of contents has it."""

    name: str
    start: int
    size_bytes: int
    crc: int


def digest(path: Path) -> str:
    """Return the SHA-256 of the bytes that no CRC covers: a few kilobytes, so a file just written is not read again."""
    with damage_named(path), path.open("rb", buffering=0) as file:
        return digest_of(file)


def digest_of(file: FileIO) -> str:
    """Return the digest of an open file; raises what `damage_named` knows."""
    seen, position = hashlib.sha256(), 0
    size_bytes = os.fstat(file.fileno()).st_size
    for entry in records_in(file):
        _read(file, position, entry.start - position, seen.update)
        position = entry.start + entry.size_bytes
    _read(file, position, size_bytes - position, seen.update)
    return seen.hexdigest()


def check_outline(path: Path, *, size_bytes: int, expected_digest: str) -> None:
    """Raise CheckpointCorrupt, or OSError, unless size and digest are the ones recorded: cheap, the data is not read."""
    if (found := path.stat().st_size) != size_bytes:
        raise damaged(path, f"it has {found} bytes, saved were {size_bytes}")
    if digest(path) != expected_digest:
        raise damaged(path, "its headers or its table of contents are not the ones that were saved")


def check_content(
    path: Path, on_bytes: Callable[[int], object] = lambda _: None, *, share: tuple[int, int] = (0, 1)
) -> None:
    """Read the records and raise CheckpointCorrupt, naming one, unless its CRC-32 is right.

    `share` (i, n) is the i-th of n parts, about equal in bytes, to be read by as many processes; one that reads all
    uses several threads, and `on_bytes` hears from each how many bytes they are on.
    """
    index, count = share
    with damage_named(path), path.open("rb", buffering=0) as file:
        records = sorted(records_in(file), key=lambda entry: -entry.size_bytes)
        if not any(entry.crc for entry in records):  # another program's file, by a torch that was told to make none
            return
        records = records[index::count]

        def check(entry: Record) -> None:
            if crc_of(file, entry, on_bytes) != entry.crc:
                raise wrong_crc(path, entry)

        if count > 1 or sum(entry.size_bytes for entry in records) < _THREADS * _CHUNK_BYTES:
            for entry in records:
                check(entry)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                list(pool.map(check, records))
            finally:
                pool.shutdown(cancel_futures=True)


def check_records(path: Path, contents: Iterable[memoryview]) -> None:
    """Raise CheckpointCorrupt unless each of these is, by size and CRC-32, the content of one of the file's tensors.

    So what was mapped from the file is checked without reading the rest, but for the small records that are no tensors.
    """
    with damage_named(path), path.open("rb", buffering=0) as file:
        records = list(records_in(file))
        if not any(entry.crc for entry in records):  # another program's file, by a torch that was told to make none
            return
        for entry in records:
            if "/data/" not in entry.name and crc_of(file, entry) != entry.crc:
                raise damaged(path, f"the record {entry.name!r} does not match its CRC-32")
        known = {(entry.size_bytes, entry.crc) for entry in records}
        for content in contents:
            if (len(content), _crc_of_slices(content)) not in known:
                raise damaged(path, f"a tensor of {len(content)} bytes does not match any CRC-32")


class RecordStream(atomic.Stream):
    """What `torch.save` writes to when it is told to leave the CRCs out: here they are made faster.

    A slice is summed on its way to the file, which finds it in the processor's cache.
    """

    def __init__(self, descriptor: int, on_written: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(descriptor, on_written)
        self._crc = 0
        self._pieces: dict[int, tuple[int, int]] = {}

    def write(self, content: bytes | memoryview) -> int:
        """Write every byte, and remember where they lie and their CRC-32."""
        start, self._crc = self.written_bytes, 0
        size_bytes = super().write(content)
        self._pieces[start] = size_bytes, self._crc
        return size_bytes

    def write_slice(self, part: memoryview) -> None:
        """Sum and write a few megabytes at most."""
        self._crc = crc32(part, self._crc)
        super().write_slice(part)

    def fill_crcs(self) -> None:
        """Put the CRCs where torch left zeros: behind each record that has a descriptor, and in the table of contents."""
        self.flush()
        with os.fdopen(os.dup(self.descriptor), "rb", buffering=0) as file, zipfile.ZipFile(file) as archive:
            records = {entry.name: entry for entry in records_in(file)}
            table_start, position = archive.start_dir, 0
            file.seek(table_start)
            table = bytearray(file.read())
            for info in archive.infolist():  # in the order of the table
                entry = records[info.filename]
                size_bytes, crc = self._pieces.get(entry.start, (-1, 0))
                if size_bytes != entry.size_bytes:  # torch wrote it in several pieces
                    crc = crc_of(file, entry)
                if info.flag_bits & _HAS_DESCRIPTOR:
                    os.pwrite(self.descriptor, _CRC.pack(crc), entry.start + entry.size_bytes + _CRC_IN_DESCRIPTOR)
                _CRC.pack_into(table, position + _CRC_IN_ENTRY, crc)
                position += _ENTRY_BYTES + sum(_ENTRY_LENGTHS.unpack_from(table, position + _LENGTHS_IN_ENTRY))
            os.pwrite(self.descriptor, table, table_start)


class FilledStream(RecordStream):
    """Where torch would leave a hole for a tensor's bytes (`torch.serialization.skip_data`), the next of `pieces` go.

    So a file is written whose tensors never lie in memory as a whole. An error of `pieces` is kept in `error`.
    """

    def __init__(self, descriptor: int, pieces: Iterator[memoryview]) -> None:
        super().__init__(descriptor)
        self._filling = pieces

    def seek(self, size_bytes: int, _whence: int) -> None:
        """Write the bytes of one record."""
        start, self._crc = self.written_bytes, 0
        try:
            while (left := start + size_bytes - self.written_bytes) > 0:
                piece = next(self._filling)
                assert len(piece) <= left, "torch asks for the tensors in another order than they are in"
                for position in range(0, len(piece), _CHUNK_BYTES):
                    self.write_slice(piece[position : position + _CHUNK_BYTES])
        except BaseException as error:
            self.error = error
            raise
        self._pieces[start] = size_bytes, self._crc


def contents(path: Path) -> dict[str, Any]:
    """Return the plain part of what was saved: numbers, texts, lists and dicts; tensors and other objects as None.

    Nothing in the file is run: every class and function it names is replaced by one that does nothing.
    """
    with damage_named(path), zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if name is None:
            raise damaged(path, "it holds no data.pkl, so torch.save did not write it")
        with archive.open(name) as file:
            try:
                found = PlainUnpickler(file).load()
            except (pickle.UnpicklingError, AttributeError, TypeError, IndexError, KeyError) as error:
                raise damaged(path, f"its data.pkl cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


class Inert(dict[Any, Any]):
    """Stands for any class or function that a pickle names; takes whatever it is given and keeps nothing."""

    def __new__(cls, *_: Any) -> Self:
        """Take anything."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        """Forget it."""

    def append(self, _: Any) -> None:
        """Forget it."""

    def extend(self, _: Any) -> None:
        """Forget it."""


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle without running anything: what it names is `Inert`, and tensors are None."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or a function."""
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else Inert

    def persistent_load(self, pid: Any) -> Any:
        """Return what stands for a tensor's memory."""
        del pid


def records_in(file: FileIO) -> Iterator[Record]:
    """Yield where the data of each record lies, in the order of the file."""
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.header_offset < end:
            raise zipfile.BadZipFile(f"the record {entry.filename!r} does not lie as torch.save puts it")
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        start = entry.header_offset + len(header) + sum(_LENGTHS.unpack(header[-_LENGTHS.size :]))
        end = start + entry.compress_size
        yield Record(entry.filename, start, entry.compress_size, entry.CRC)


def _crc_of_slices(content: memoryview) -> int:
    crc = 0
    for start in range(0, len(content), _CHUNK_BYTES):
        crc = crc32(content[start : start + _CHUNK_BYTES], crc)
    return crc


def crc_of_bytes(content: memoryview) -> int:
    """Return the CRC-32 of bytes in memory."""
    return crc32(content)


def joined_crc(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two stretches on end, from that of each: what zlib calls crc32_combine."""
    return _product(_shift_by(second_bytes), first) ^ second


_POLYNOMIAL = 0xEDB88320  # that of the CRC-32, its bits in reverse, as everything here


@functools.lru_cache
def _shift_by(size_bytes: int) -> int:
    """Return what so many zero bytes multiply a CRC by: x to the power of their bits, by squaring."""
    power, square = 1 << 31, 1 << 23  # 1 and x to the power of 8
    while size_bytes:
        if size_bytes & 1:
            power = _product(square, power)
        square = _product(square, square)
        size_bytes >>= 1
    return power


def _product(one: int, other: int) -> int:
    """Multiply two polynomials over GF(2), modulo the CRC's."""
    product = 0
    while one:
        if one & 1 << 31:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


def crc_of(file: FileIO, entry: Record, on_bytes: Callable[[int], object] = lambda _: None) -> int:
    """Read a record and return its CRC-32."""
    crc = 0

    def add(part: memoryview) -> None:
        nonlocal crc
        crc = crc32(part, crc)
        on_bytes(len(part))

    _read(file, entry.start, entry.size_bytes, add)
    return crc


def _read(file: FileIO, start: int, size_bytes: int, take: Callable[[memoryview], object]) -> None:
    if start < 0 or size_bytes < 0:
        raise zipfile.BadZipFile("its records overlap")
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size_bytes)))
    end = start + size_bytes
    while start < end:
        count = os.preadv(file.fileno(), [buffer[: end - start]], start)
        if not count:
            raise EOFError("it ends too early")
        take(buffer[:count])
        start += count


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what reading a damaged zip may raise into CheckpointCorrupt."""
    try:
        with naming(path):
            yield
    except RunError:  # it says what is wrong, though it may be a ValueError as well
        raise
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, NotImplementedError,
        RuntimeError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise damaged(path, str(error) or type(error).__name__) from error


def wrong_crc(path: Path, entry: Record) -> CheckpointCorrupt:
    """Return the error for a record whose bytes changed."""
    return damaged(path, f"the record {entry.name!r} does not match its CRC-32")


def damaged(path: Path, reason: str) -> CheckpointCorrupt:
    """Return the error for a file whose bytes are not the ones that were saved."""
    return CheckpointCorrupt(f"{path} is damaged: {reason}", path=str(path), reason=reason)
