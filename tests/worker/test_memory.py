"""The memory that is left: the kernel's estimate, and the limits of every control group that this process is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from runmgr.worker import memory

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def kernel(tmp_path):
    """Show a kernel with 1000 kB free and the given groups; returns where."""

    def show(cgroup, groups):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text("MemTotal: 5000 kB\nMemAvailable:    1000 kB\n")
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for path, (names, limit, used, cache) in groups.items():
            folder = tmp_path / "cgroup" / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names[0]).write_text(f"{limit}\n")
            (folder / names[1]).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\ninactive_file_other 9\n")
        return {"proc": tmp_path / "proc", "groups": tmp_path / "cgroup"}

    return show


CASES = {
    "no limit": ("0::/a/b\n", {"a/b": (_V2, "max", 5, 5)}, 1000 << 10),
    "own": ("0::/a/b\n", {"a/b": (_V2, 900, 500, 50), "a": (_V2, "max", 1, 1)}, 450),
    "a parent's is nearer": ("0::/a/b/c\n", {"a/b/c": (_V2, 900, 500, 0), "a": (_V2, 800, 700, 20)}, 120),
    "the root, as a container sees its own": ("0::/\n", {".": (_V2, 900, 500, 0)}, 400),
    "the host's path in a container": ("4:memory:/docker/f00\n", {"memory": (_V1, 900, 600, 7)}, 307),
    "version 1": (
        "5:cpu:/x\n4:hugetlb,memory:/a/b\n0::/\n",
        {"memory/a/b": (_V1, 9223372036854771712, 5, 0), "memory/a": (_V1, 700, 600, 10), "x": (_V2, 1, 1, 0)},
        110,
    ),
    "a group outside": ("0::/../../b\n", {".": (_V2, 900, 500, 0)}, 400),
}


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_limit_of_all_groups_counts(case, kernel):
    cgroup, groups, left = CASES[case]
    assert memory.available_bytes(**kernel(cgroup, groups)) == left


def test_a_kernel_without_groups_is_asked_for_what_is_free(kernel):
    shown = kernel("", {})
    (shown["proc"] / "self/cgroup").unlink()
    assert memory.available_bytes(**shown) == 1000 << 10


def test_where_nothing_is_known_nothing_is_refused():
    assert memory.available_bytes(proc=Path("/nowhere")) > 1 << 60


def test_this_machine_has_some():
    assert 1 << 20 < memory.available_bytes() < 1 << 50
