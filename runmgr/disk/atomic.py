"""Write, replace, link, lock: durable or not at all.

Every function leaves either what was there before or the whole new thing, also when the process is killed, the disk
is full or the power fails; temporaries carry `TEMPORARY` in their names, and nobody reads those. An `OSError` from here
always names a path.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEMPORARY = ".tmp-"
LOCK_TIMEOUT_S = 10.0
_STALE_S = 3.0
_PATIENCE = 8
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.02
_NO_LOCKS_HERE = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, 524}
_NEVER_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_NO_LINKS_HERE = _NEVER_LINKS | {errno.EMLINK, errno.EXDEV}  # these two hold for one file, or one pair
_COPY_CHUNK_BYTES = 4 << 20
_SLICE_BYTES = 4 << 20
_SMALL_BYTES = 64 << 10
_WRITEBACK_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_UNKNOWN_BYTES = 1 << 62
_CLOCK_TICK_S = 0.01  # kernels stamp files with the time of their last tick


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an `OSError` that does not say which file it is about."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def temporary_beside(path: Path) -> Path:
    """Return a fresh temporary name in the directory of `path`, so that renaming it to `path` stays on one file system."""
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}")


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable; file systems that cannot sync directories keep their own promise."""
    with naming(directory):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
        finally:
            os.close(descriptor)


@contextmanager
def new_file(path: Path, *, mode: int = 0o666) -> Iterator[int]:
    """Yield a descriptor for the content of `path`; the name appears, whole and durable, when the block ends.

    The umask and a setgid directory rule over `mode`, as for any file. After an error nothing is left.
    """
    temporary = temporary_beside(path)
    with naming(path):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                yield descriptor
                if not mode & 0o222:
                    os.fchmod(descriptor, os.fstat(descriptor).st_mode & 0o555)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
    sync_directory(path.parent)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file that may be replaced meanwhile, also where that says ESTALE (GlusterFS, NFS)."""
    deadline = time.monotonic() + _STALE_S
    while True:
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE or time.monotonic() > deadline:
                raise
        time.sleep(_LONGEST_PAUSE_S)  # until this host has forgotten what lay there before


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by a file that holds `content`."""
    with new_file(path) as descriptor:
        write_all(descriptor, content)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as readable JSON."""
    write_bytes(path, dump_json(value))


def write_derived_json(path: Path, value: Any) -> None:
    """Replace `path` atomically for readers, but not durably: for what can be made again from other files."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(dump_json(value))
        os.replace(temporary, path)
    finally:
        remove(temporary)


def dump_json(value: Any) -> bytes:
    """Encode `value` the way every record is written: UTF-8, indented, strict JSON without NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode(errors="surrogateescape") + b"\n"


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write every byte, however many calls that takes."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


class Stream:
    """An open file's content, written in slices that reach the disk while the next ones are made.

    Between two slices other threads run; and the kernel is asked to start writing every few megabytes, so that the
    fsync at the end finds little left to do. Small pieces are gathered: each call costs a turn of the interpreter lock.
    """

    def __init__(self, descriptor: int, on_written: Callable[[int], None] = lambda _: None) -> None:
        self.descriptor = descriptor
        self.written_bytes = 0
        self.error: BaseException | None = None
        self._on_written = on_written
        self._gathered = bytearray()
        self._started = 0

    def write(self, content: bytes | memoryview) -> int:
        """Write every byte; an OSError is also kept in `error`, for callers that lose it."""
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _SLICE_BYTES):
            self.write_slice(view[start : start + _SLICE_BYTES])
        return len(view)

    def write_slice(self, part: memoryview) -> None:
        """Write a few megabytes at most, or keep a few bytes for later."""
        self.written_bytes += len(part)
        if len(part) < _SMALL_BYTES:
            self._gathered += part
            if len(self._gathered) < _SLICE_BYTES:
                return
            part = memoryview(b"")
        self.flush()
        self._put(part)
        self._on_written(self.written_bytes)
        if self.written_bytes - self._started >= _WRITEBACK_BYTES:
            _start_writeback(self.descriptor, self._started, self.written_bytes - self._started)
            self._started = self.written_bytes

    def flush(self) -> None:
        """Write what was kept."""
        gathered, self._gathered = self._gathered, bytearray()
        self._put(memoryview(gathered))

    def _put(self, content: memoryview) -> None:
        try:
            write_all(self.descriptor, content)
        except OSError as error:
            self.error = error
            raise


def _start_writeback(descriptor: int, offset: int, size_bytes: int) -> None:
    """Ask the kernel to begin writing these bytes, without waiting for it (Linux; elsewhere the fsync does it all).

    Only a hint: its errors are left to the fsync, which reports them too.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, offset, size_bytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    import ctypes

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def free_bytes(directory: Path) -> int:
    """Return how much this user can still write to the file system that holds `directory`, as far as it says."""
    with naming(directory):
        found = os.statvfs(directory)
    if not found.f_blocks:  # some FUSE file systems know nothing of their size
        return _UNKNOWN_BYTES
    return found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)


def create_bytes(path: Path, content: bytes) -> None:
    """Make `path` with `content`; exactly one of several rivals succeeds, the others get `FileExistsError`.

    Where links work, nobody ever sees a part of the content.
    """
    temporary = temporary_beside(path)
    try:
        write_bytes(temporary, content)
        if not _link(temporary, path):
            with naming(path):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                try:
                    write_all(descriptor, content)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
    finally:
        remove(temporary)
    sync_directory(path.parent)


def leave_bytes(path: Path, content: bytes) -> None:
    """Like `create_bytes`, without waiting for the disk: the last words of a process that may be killed in a moment."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(content)
        if not _link(temporary, path):
            with path.open("xb") as file:
                file.write(content)
    finally:
        remove(temporary)


def clock_offset_s(directory: Path) -> float | None:
    """Return how far the clock of the file server is ahead of this host's, to a hundredth of a second, by a fresh file.

    0 where the server's time lies within the call, give or take the tick of its clock; None where nothing can be written.
    """
    probe = temporary_beside(directory / "clock")
    before = time.time()
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            there = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            remove(probe)
    except OSError:
        return None
    after = time.time()
    offset = there - before if there < before else max(0.0, there - after)
    return 0.0 if abs(offset) < _CLOCK_TICK_S else round(offset, 2)


def point_name(name: Path, target: Path) -> None:
    """Make `name` another name of the file `target`, atomically; by a copy where hard links do not work.

    The caller syncs the directory once it has pointed all its names.
    """
    temporary = temporary_beside(name)
    try:
        if not _link(target, temporary):
            copy(target, temporary)
        os.replace(temporary, name)
    finally:
        remove(temporary)  # POSIX: renaming one name of a file to another of its names does nothing


_without_links: set[int] = set()  # file systems that this process found to have none


def _link(target: Path, name: Path) -> bool:
    """Link, or say that it cannot be done here; a file system that has no links at all is asked only once."""
    found = os.stat(target)
    if found.st_dev in _without_links:
        return False
    try:
        os.link(target, name)
    except OSError as error:
        if error.errno not in _NO_LINKS_HERE:
            raise
        if error.errno in _NEVER_LINKS and found.st_uid == os.geteuid():  # a foreign file may only be protected
            _without_links.add(found.st_dev)
        return False
    return True


def copy(source: Path, target: Path, *, mode: int = 0o444, on_bytes: Callable[[int], object] = lambda _: None) -> None:
    """Make `target`, which must not exist, a copy of `source`, durable; shared extents where the disk can."""
    with source.open("rb") as reader, new_file(target, mode=mode) as descriptor, naming(target):
        try:
            while count := os.copy_file_range(reader.fileno(), descriptor, _COPY_CHUNK_BYTES * 16):
                on_bytes(count)
        except OSError as error:
            if error.errno not in {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            os.lseek(descriptor, 0, os.SEEK_SET)
            reader.seek(0)
            while chunk := reader.read(_COPY_CHUNK_BYTES):
                write_all(descriptor, chunk)
                on_bytes(len(chunk))


def give_name(temporary: Path, path: Path) -> None:
    """Move a durable temporary file to `path`; raises FileExistsError, and leaves both, when something lies there."""
    if _link(temporary, path):
        remove(temporary)
    elif os.path.lexists(path):  # where links do not work this is as near as one comes
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    else:
        os.replace(temporary, path)
    sync_directory(path.parent)


def move_directory(path: Path, target: Path) -> None:
    """Give a directory another place on its file system, in one step; nothing but an empty directory may lie there."""
    os.rename(path, target)
    sync_directory(target.parent)
    sync_directory(path.parent)


def create_empty(path: Path) -> None:
    """Make an empty file, durably; one that is there already stays. There is no moment with a temporary."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        path.unlink()


@contextmanager
def locked(path: Path, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[str | None]:
    """Hold the lock file `path` if that can be had; yields None, or why not.

    Never the ground of a promise: flock is missing on some shared file systems and per-host on others. It keeps order
    and spares retries. The file is never removed, since a lock on a removed file excludes nobody.
    """
    import filelock

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError as error:  # another user's file in a shared root
        yield f"the lock {path} cannot be opened ({error.strerror})"
        return
    try:
        reason = _wait_for_lock(path, descriptor, timeout_s)
        yield reason
        if reason is None:
            filelock.unlock_descriptor(descriptor)
    finally:
        os.close(descriptor)  # this releases it as well


def _wait_for_lock(path: Path, descriptor: int, timeout_s: float) -> str | None:
    """Ask for the lock ever more seldom: 64 waiters that ask every 2 ms would leave its holder no processor."""
    import filelock

    start = time.monotonic()
    while True:
        try:
            if filelock.lock_descriptor(descriptor, blocking=False):
                return None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            return f"locks do not work at {path} ({error.strerror})"
        waited_s = time.monotonic() - start
        if waited_s > timeout_s:
            return f"the lock {path} was held by another process for more than {timeout_s:g} s"
        time.sleep(min(max(waited_s / _PATIENCE, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))
