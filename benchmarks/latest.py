"""Finding the latest of N runs: `get_latest_run_id` against `max(os.listdir)`, the least that a listing can cost.

    python benchmarks/latest.py [--rounds 31]

super-gradients' way, written anew, is to sort the names and to ask of each whether it is a run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from runmgr.disk.catalog import get_latest_run_id

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (10, 100, 1_000, 10_000, 100_000)


def largest_name(root: Path) -> str:
    """The limit."""
    return max(os.listdir(root / "experiment"))


def sorted_names(root: Path) -> str:
    """Every name is looked at and sorted before the first is opened, as super-gradients does."""
    experiment = root / "experiment"
    runs = [name for name in os.listdir(experiment) if os.path.basename(name).startswith("RUN_")]
    runs = [name for name in runs if (experiment / name).is_dir()]
    return next(name for name in sorted(runs, reverse=True) if (experiment / name / "ckpt_latest.pth").exists())


def runmgr(root: Path) -> str:
    """Ours."""
    return str(get_latest_run_id("experiment", root))


def main() -> None:
    """Grow one experiment from 10 to 100,000 runs and print medians, spread and ratios at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    ways: dict[str, Callable[[Path], str]] = {"max(os.listdir)": largest_name, "runmgr": runmgr, "sorted": sorted_names}
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, {rounds} interleaved rounds, medians in ms")
    print(f"{'runs':>9}{'max(os.listdir)':>17}{'runmgr':>10}{'ratio':>8}{'quartiles':>16}{'sorted':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        root, made = Path(folder), 0
        (root / "experiment").mkdir()
        for size in SIZES:
            for number in range(made, size):
                run = root / "experiment" / f"RUN_20260101_{number // 10_000:06d}_{number % 10_000:06d}"
                run.mkdir()
                (run / "ckpt_latest.pth").touch()
            made = size
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(root)
                    times[name].append((time.perf_counter() - start) * 1000)
            limit, ours, theirs = (statistics.median(times[name]) for name in ways)
            ratios = [one / other for one, other in zip(times["runmgr"], times["max(os.listdir)"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            spread = f"{low:.2f} to {high:.2f}"
            print(
                f"{size:>9,}{limit:>17.3f}{ours:>10.3f}{ours / limit:>8.2f}{spread:>16}{theirs:>10.2f}{theirs / limit:>8.1f}"
            )


if __name__ == "__main__":
    main()
