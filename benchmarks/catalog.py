"""Finding runs among N: `latest`, `ls` and `best` against the least that a listing and file reads can cost.

    python benchmarks/catalog.py [--rounds 15] [--most 100000] [--folder DIR]

The limits are `max(os.listdir)` for latest, that and 20 records read for ls, and 40 µs a run for best. "read" opens and
reads a record, "read + decode" hands it to `json.loads` as well. A hundred thousand runs take about 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from runmgr.disk import summary
from runmgr.disk.catalog import best_run, get_latest_run_id, list_runs

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (10, 100, 1_000, 10_000, 100_000)
SHOWN = 20
PACKAGES = {f"package-{number}": f"{number}.0.1" for number in range(150)}


def main() -> None:
    """Grow one experiment and print medians and ratios at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="the greatest number of runs")
    parser.add_argument("--folder", help="where the runs are made ($TMPDIR)")
    given = parser.parse_args()
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, {given.rounds} interleaved rounds, medians in ms")
    print(f"{'runs':>9}{'listdir':>10}{'latest':>10}{'ratio':>7}{'+ reads':>10}{'ls':>10}{'ratio':>7}"
          f"{'+ decode':>10}{'ratio':>7}{'best':>10}{'µs/run':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root, made = Path(folder), 0
        for size in (size for size in SIZES if size <= given.most):
            grow(root / "experiment", made, size)
            made = size
            print_line(size, measure(root, given.rounds))


def grow(experiment: Path, made: int, size: int) -> None:
    """Make runs as runmgr leaves them: a record of 6 kB, a checkpoint's name."""
    for number in range(made, size):
        run_id = f"RUN_20260101_{number // 10_000:06d}_{number % 10_000:06d}"
        run = experiment / run_id
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps(record(run_id, number), indent=1) + "\n")
        (run / "ckpt_latest.pth").touch()


def record(run_id: str, number: int) -> dict[str, object]:
    """A record with the summary in front, as a training writes it."""
    time_ = "2026-01-01T00:00:00.000000+00:00"
    checkpoint = {
        "attempt": 1, "sequence": 5, "epoch": 5, "step": 40, "metrics": {"val/accuracy": number * 7919 % 100_003 / 1e5},
        "size_bytes": 22_309, "saved": time_,
    }  # fmt: skip
    known = {
        "status": "completed", "created": time_, "ended": time_, "attempt": 1, "world_size": 8, "tags": ["sweep"],
        "monitor": "val/accuracy", "mode": "max", "latest": checkpoint, "best": checkpoint,
    }  # fmt: skip
    return (
        {"format": 1}
        | dict.fromkeys(summary.FIELDS)
        | known
        | {"run_id": run_id, "packages": PACKAGES, "git": {"diff": "+x\n" * 500}}
    )


def measure(root: Path, rounds: int) -> dict[str, float]:
    """Run all in turn, again and again; returns medians in ms."""
    experiment = root / "experiment"
    ways: dict[str, Callable[[], object]] = {
        "listdir": lambda: max(os.listdir(experiment)),
        "latest": lambda: get_latest_run_id("experiment", root),
        "reads": lambda: [read(experiment, name) for name in newest(experiment)],
        "decodes": lambda: [json.loads(read(experiment, name)) for name in newest(experiment)],
        "ls": lambda: list_runs("experiment", root, limit=SHOWN),
        "best": lambda: best_run("experiment", "val/accuracy", mode="max", ckpt_root_dir=root),
    }
    runs = len(os.listdir(experiment))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            if name == "best" and runs > 10_000 and number > 3:
                continue
            start = time.perf_counter()
            way()
            if number:  # the first round warms the caches
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(taken) for name, taken in times.items()}


def newest(experiment: Path) -> list[str]:
    """One listing, and names to read: which ones does not matter to the time."""
    names = os.listdir(experiment)
    max(names)
    return names[:SHOWN]


def read(experiment: Path, name: str) -> bytes:
    """The least that a read can be."""
    descriptor = os.open(f"{experiment}/{name}/run.json", os.O_RDONLY)
    content = os.read(descriptor, 1 << 16)
    os.close(descriptor)
    return content


def print_line(size: int, ms: dict[str, float]) -> None:
    """One size."""
    print(
        f"{size:>9,}{ms['listdir']:>10.3f}{ms['latest']:>10.3f}{ms['latest'] / ms['listdir']:>7.2f}"
        f"{ms['reads']:>10.3f}{ms['ls']:>10.3f}{ms['ls'] / ms['reads']:>7.2f}"
        f"{ms['decodes']:>10.3f}{ms['ls'] / ms['decodes']:>7.2f}{ms['best']:>10.2f}{ms['best'] * 1000 / size:>8.1f}"
    )


if __name__ == "__main__":
    main()
