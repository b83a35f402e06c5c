"""How much memory this process can still use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNKNOWN = 1 << 62


class _Files(NamedTuple):
    """What a version of control groups calls its limit, the use that counts against it, and the cache it would give back."""

    limit: str
    used: str
    cache: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that can still be had: the kernel's estimate, or less where a control group's limit is nearer.

    A group's limit holds for all groups below it, so this process's own and each of its parents are asked, as far as they
    are visible: `proc` and `groups` are where the kernel shows them.
    """
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: nothing known, nothing refused
        return _UNKNOWN
    return min(free, *(_left_in(group, files) for group, files in _own_groups(proc, groups)), _UNKNOWN)


def _own_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the memory groups that this process is in, innermost first, in both versions' trees.

    In a container the path may be the host's, of which only the last part, mounted as the root, can be seen; so
    directories that do not exist are tried like others, and `..` is a group outside.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            roots, files = [groups, groups / "unified"], _VERSION_2
        elif "memory" in controllers.split(","):
            roots, files = [groups / "memory"], _VERSION_1
        else:
            continue
        parts = [part for part in path.split("/") if part not in {"", ".."}]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth]), files


def kills(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processes the kernel has killed in this process's control group because memory ran out."""
    for group, _ in _own_groups(proc, groups):
        for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
            try:
                fields = dict(line.split() for line in (group / name).read_text().splitlines())
                return int(fields["oom_kill"])
            except (OSError, KeyError, ValueError):
                continue
    return 0


def _left_in(group: Path, files: _Files) -> int:
    try:
        limit, used = (int((group / name).read_text()) for name in (files.limit, files.used))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics[files.cache])
    except (OSError, KeyError, ValueError):  # no limit ("max"), the root of version 2, or not visible from here
        return _UNKNOWN
