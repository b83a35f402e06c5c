"""What a file system does when one host asks it: create, link, rename, lock, sync.

Each probe ends in a Finding. They use the raw system calls, not `atomic`, because how those behave is the question.
"""

from __future__ import annotations

import errno
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

from runmgr.disk.probe import (
    CHILD_LIMIT_S,
    ELSEWHERE,
    NO_ORDER,
    WRONG_CLOCK_S,
    Child,
    Finding,
    judge_race,
    locked,
    mount_of,
    race,
    try_lock,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runmgr.disk.probe import Verdict

_RIVALS, _RACES = 4, 50
_LINKS, _LINKS_LIMIT_S, _FEW_LINKS = 128, 0.5, 16
_SYNCS, _SYNCS_LIMIT_S, _SLOW_SYNC_S, _SYNCS_IN_A_SAVE = 15, 3.0, 0.2, 7
_WRITE_BYTES, _WRITE_LIMIT_S, _SLOW_WRITE = 64 << 20, 5.0, 10e6
_LITTLE_BYTES, _FEW_FILES = 1 << 30, 1000


def check_one_host(folder: Path) -> list[Finding]:
    """Run every probe of one host in `folder`, an empty directory."""
    return [_guarded(name, probe, folder) for name, probe in PROBES.items()]


def _guarded(name: str, probe: Callable[[Path], Finding], folder: Path) -> Finding:
    own = folder / name.replace(" ", "-")
    try:
        own.mkdir()
        return probe(own)
    except OSError as error:
        return Finding(name, "unsafe", f"failed: {error.strerror}", "a training would fail the same way", ELSEWHERE)


def _file_system(folder: Path) -> Finding:
    mount = mount_of(folder)
    kind, options = mount.kind, set(mount.options)
    said = f"{kind} from {mount.source}" if mount.source not in {"", kind} else kind
    if kind in {"tmpfs", "ramfs"}:
        return Finding(
            "file system", "unsafe", f"{said}: memory", "a power cut or reboot loses every checkpoint", ELSEWHERE
        )
    if kind == "overlay":
        text = "checkpoints go when the container is removed"
        return Finding("file system", "worse", f"{said}: a container's own layer", text, "mount a volume there")
    if kind.startswith("nfs") and "soft" in options:
        text = "a save fails when the server is away for long"
        return Finding("file system", "worse", f"{said}, soft", text, "mount it with the option hard")
    return Finding("file system", "fine", said, "", figures=mount._asdict())


def _race_of_processes(folder: Path, name: str, make: Callable[[str], None]) -> Finding:
    names = [str(folder / f"{index:04d}") for index in range(_RACES)]
    start = time.monotonic() + 0.05

    def run() -> Any:
        time.sleep(max(0.0, start - time.monotonic()))
        tried, won, told = race(make, names)
        return tried, won, sorted(told)

    rivals = [Child(run) for _ in range(_RIVALS)]
    return judge_race(name, [rival.result() for rival in rivals], f"{_RIVALS} processes")


def _exclusive_create(folder: Path) -> Finding:
    def make(name: str) -> None:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

    return _race_of_processes(folder, "exclusive create", make)


def _mkdir(folder: Path) -> Finding:
    return _race_of_processes(folder, "mkdir", os.mkdir)


def _locks(folder: Path) -> Finding:
    path = folder / "lock"

    def hold() -> bool:
        with locked(path):
            return bool(Child(lambda: try_lock(path)).result(CHILD_LIMIT_S / 2))

    try:
        both = Child(hold).result()
        again = Child(lambda: try_lock(path)).result()
    except OSError as error:
        return Finding(
            "locks", "worse", f"flock fails: {error.strerror}", NO_ORDER, "mount it with locks, if it has them"
        )
    if both:
        return Finding(
            "locks", "worse", "two processes held one lock at once", NO_ORDER, "mount it with locks that work"
        )
    if not again:
        text = f"each start waits 10 s for the lock, then {NO_ORDER}"
        return Finding("locks", "worse", "a lock stays held after its holder ended", text, "look at the lock server")
    mount = mount_of(folder)
    if mount.kind == "fuse.sshfs" or {"nolock", "local_lock=all", "local_lock=flock"} & set(mount.options):
        text = f"processes of this host exclude each other, other hosts do not hear of it ({mount.kind})"
        return Finding("locks", "worse", text, f"between hosts, {NO_ORDER}", "on NFS: version 4 and without local_lock")
    return Finding("locks", "fine", "processes exclude each other", "launches of the same moment are numbered in order")


def _hard_links(folder: Path) -> Finding:
    target = folder / "target"
    target.write_bytes(b"x")
    copies = "every further name of a checkpoint (best, epoch) is a copy that costs its bytes and time again"
    made, deadline = 1, time.monotonic() + _LINKS_LIMIT_S
    try:
        while made <= _LINKS and time.monotonic() < deadline:
            os.link(target, folder / f"link-{made}")
            made += 1
    except OSError as error:
        if made == 1:
            return Finding("hard links", "worse", f"fail: {error.strerror}", copies, ELSEWHERE)
        said = f"{made} names a file, then {error.strerror}"
        verdict: Verdict = "worse" if made < _FEW_LINKS else "fine"
        advice = "raise the limit (GlusterFS: storage.max-hardlinks)" if verdict == "worse" else ""
        return Finding("hard links", verdict, said, f"beyond that, {copies}", advice, {"names": made})
    said = f"work, {made} names a file"
    if target.stat().st_nlink < made:
        said += f"; the link count says {target.stat().st_nlink}"
    return Finding("hard links", "fine", said, "all names of a checkpoint share its bytes", figures={"names": made})


def _rename(folder: Path) -> Finding:
    name, new = folder / "name", folder / "new"
    name.write_bytes(b"old")
    new.write_bytes(b"new")
    try:
        os.replace(new, name)
        name.chmod(0o444)
        new.write_bytes(b"newer")
        os.replace(new, name)
        name.chmod(0o444)
    except OSError as error:
        text = "checkpoints and records are put in place by it, so every save fails"
        return Finding("rename", "unsafe", f"over an existing name fails: {error.strerror}", text, ELSEWHERE)
    if name.read_bytes() != b"newer":
        text = "a save could leave the old checkpoint under the new one's name"
        return Finding("rename", "unsafe", "the name still holds what was replaced", text, ELSEWHERE)
    try:
        name.unlink()
    except OSError as error:
        text = "checkpoints are read-only, so those that Keep lets go stay all the same"
        return Finding("rename", "worse", f"a read-only file cannot be removed: {error.strerror}", text, ELSEWHERE)
    return Finding(
        "rename", "fine", "replaces an existing name, read-only or not", "names are swung by it, whole or not at all"
    )


def _directory_sync(folder: Path) -> Finding:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        said = f"fails: {error.strerror}"
        if error.errno in {errno.EINVAL, errno.ENOTSUP}:
            text = "a name is as durable as the file system makes it: a power cut may undo the last save"
            return Finding("directory fsync", "worse", said, text, ELSEWHERE)
        return Finding("directory fsync", "unsafe", said, "every save fails", ELSEWHERE)
    finally:
        os.close(descriptor)
    return Finding("directory fsync", "fine", "works", "a name that a save reported survives a power cut")


def _file_sync(folder: Path) -> Finding:
    took: list[float] = []
    with open(folder / "small", "wb", buffering=0) as file:
        deadline = time.monotonic() + _SYNCS_LIMIT_S
        while len(took) < _SYNCS and time.monotonic() < deadline:
            file.write(b"x" * 4096)
            start = time.monotonic()
            os.fsync(file.fileno())
            took.append(time.monotonic() - start)
    median, longest = statistics.median(took), max(took)
    said = f"{1e3 * median:.2g} ms, longest {1e3 * longest:.2g} ms"
    text = f"a save waits for about {_SYNCS_IN_A_SAVE} of them: {1e3 * _SYNCS_IN_A_SAVE * median:.2g} ms"
    figures = {"median_s": median, "longest_s": longest}
    if median > _SLOW_SYNC_S:
        return Finding(
            "fsync", "worse", said, text, "save with block=False, or put ckpt_root_dir on a faster disk", figures
        )
    return Finding("fsync", "fine", said, text, figures=figures)


def _bandwidth(folder: Path) -> Finding:
    found = os.statvfs(folder)
    limit = min(_WRITE_BYTES, found.f_frsize * found.f_bavail // 4) if found.f_blocks else _WRITE_BYTES
    part, written = os.urandom(1 << 20), 0
    start = time.monotonic()
    with open(folder / "large", "wb", buffering=0) as file:
        while written < limit and time.monotonic() - start < _WRITE_LIMIT_S:
            written += file.write(part)
        os.fsync(file.fileno())
    rate = written / (time.monotonic() - start)
    said, text = f"{rate / 1e6:.3g} MB/s", f"a checkpoint of 1 GB takes {1e9 / rate:.2g} s"
    figures = {"bytes_per_s": rate, "bytes": written}
    if rate < _SLOW_WRITE:
        advice = "save with block=False, or put ckpt_root_dir on a faster disk"
        return Finding("bandwidth", "worse", said, text, advice, figures)
    return Finding("bandwidth", "fine", said, text, figures=figures)


def _space(folder: Path) -> Finding:
    found = os.statvfs(folder)
    free, files = found.f_frsize * found.f_bavail, found.f_favail
    figures = {"free_bytes": free, "free_files": files if found.f_files else None}
    if not found.f_blocks:
        return Finding(
            "space", "fine", "the file system does not say", "a save that does not fit fails", figures=figures
        )
    said = f"{free / 1e9:.3g} GB free" + (f", {files} files" if found.f_files else "")
    text = "a save that cannot fit is refused before anything is written"
    if free < _LITTLE_BYTES or (found.f_files and files < _FEW_FILES):
        return Finding("space", "worse", said, text, "make room, or keep fewer checkpoints (Keep)", figures)
    return Finding("space", "fine", said, text, figures=figures)


def _server_clock(folder: Path) -> Finding:
    path = folder / "now"
    before = time.time()
    path.write_bytes(b"x")
    os.utime(path)  # "now", as the server sees it
    after = time.time()
    written = path.stat().st_mtime_ns
    whole_s = 0 if written % 10**9 else 1  # sshfs counts in whole seconds
    offset, uncertainty = written / 1e9 + whole_s / 2 - (before + after) / 2, (after - before + whole_s) / 2
    said = f"{offset:+.3f} s from this host's (±{uncertainty:.2g})"
    text = "run ids and logs carry the host's time; their order is kept whatever clocks say"
    figures = {"offset_s": offset, "uncertainty_s": uncertainty}
    if abs(offset) - uncertainty > WRONG_CLOCK_S:
        return Finding("server clock", "worse", said, text, "set both clocks by NTP (chrony)", figures)
    return Finding("server clock", "fine", said, text, figures=figures)


def _names(folder: Path) -> Finding:
    (folder / "Name").write_bytes(b"")
    if (folder / "name").exists():
        text = "experiments that differ in upper and lower case only are one"
        return Finding(
            "names", "worse", "upper and lower case are the same", text, "choose names that differ otherwise"
        )
    word = "wo\u0308rter \U0001f389"
    (folder / word).write_bytes(b"")
    (folder / ("n" * 235)).write_bytes(b"")
    if word not in os.listdir(folder):
        text = "an experiment may be listed under another spelling than the one you gave"
        return Finding("names", "worse", "Unicode names are changed", text, "keep to ASCII names")
    return Finding("names", "fine", "case, Unicode and long names are kept", "any experiment name works")


PROBES: dict[str, Callable[[Path], Finding]] = {
    "file system": _file_system,
    "mkdir": _mkdir,
    "exclusive create": _exclusive_create,
    "locks": _locks,
    "hard links": _hard_links,
    "rename": _rename,
    "directory fsync": _directory_sync,
    "fsync": _file_sync,
    "bandwidth": _bandwidth,
    "space": _space,
    "server clock": _server_clock,
    "names": _names,
}
