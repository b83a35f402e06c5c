"""64 launches at one instant: how long the slowest waits for its run directory, and how many directories there are.

    python benchmarks/create.py [--rounds 15] [--launches 64]

Each launch is a forked process that imported everything before; all are let go together. The limit is a bare blocking
`flock` around one `mkdir`. Lightning's version numbering and mmengine's timestamp are written anew from what they do, and
Lightning's own logger runs as well where it is installed. Then: one more run among 10, 1,000 and 100,000.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from runmgr.disk import claiming, directory

if TYPE_CHECKING:
    from collections.abc import Callable

AMONG = (10, 1_000, 100_000)


def runmgr(root: Path) -> str:
    """What start_run does to get its directory."""
    run, _ = claiming.create_run(directory.Experiment(root, "experiment"), "token")
    return run.run_id


def bare_flock(root: Path) -> str:
    """The limit: wait in the kernel for the lock, make one directory."""
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    name = f"{time.time_ns()}"
    (root / name).mkdir()
    os.close(descriptor)
    return name


def filelock_default(root: Path) -> str:
    """Filelock as it comes: a waiter looks again every 50 ms."""
    with filelock.FileLock(root / "lock"):
        name = f"{time.time_ns()}"
        (root / name).mkdir()
    return name


def bare_mkdir(root: Path) -> str:
    """No lock and no order: count up until mkdir succeeds."""
    name = time.time_ns()
    while True:
        try:
            (root / str(name)).mkdir()
        except FileExistsError:
            name += 1
        else:
            return str(name)


def version_numbers(root: Path) -> str:
    """Lightning's scheme: list, greatest number plus one, make it if it is not there."""
    taken = [int(name.split("_")[1]) for name in os.listdir(root) if name.startswith("version_")]
    name = f"version_{max(taken, default=-1) + 1}"
    (root / name).mkdir(exist_ok=True)
    return name


def second_timestamps(root: Path) -> str:
    """The scheme of mmengine: the local time in seconds, made if it is not there."""
    name = time.strftime("%Y%m%d_%H%M%S")
    (root / name).mkdir(exist_ok=True)
    return name


def lightning_logger(root: Path) -> str:
    """Lightning's own CSVLogger."""
    from lightning.fabric.loggers.csv_logs import CSVLogger

    logger = CSVLogger(root, name="experiment")
    logger.log_metrics({"loss": 1.0}, step=0)
    return str(logger.version)


def contenders() -> dict[str, Callable[[Path], str]]:
    """Everything to compare; what is not installed is left out."""
    found = {
        "bare flock + mkdir": bare_flock,
        "runmgr": runmgr,
        "filelock, 50 ms polling": filelock_default,
        "mkdir without a lock": bare_mkdir,
        "mmengine's timestamp": second_timestamps,
        "Lightning's numbering": version_numbers,
    }
    try:
        import lightning.fabric.loggers.csv_logs  # noqa: F401  # so that the forked launches need not
    except ImportError:
        print("lightning is not installed: its own logger is left out", file=sys.stderr)
    else:
        found["Lightning's CSVLogger"] = lightning_logger
    return found


def _launch(create, root, go, ready, results) -> None:
    ready.release()
    go.wait()
    start = time.perf_counter()
    name = create(root)
    results.put((name, time.perf_counter() - start))


def together(create: Callable[[Path], str], launches: int, root: Path) -> tuple[int, float]:
    """Let `launches` processes go at once; returns how many directories there are and the slowest one's seconds."""
    fork = get_context("fork")
    go, ready, results = fork.Event(), fork.Semaphore(0), fork.SimpleQueue()
    processes = [fork.Process(target=_launch, args=(create, root, go, ready, results)) for _ in range(launches)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    go.set()
    answers = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return len({name for name, _ in answers}), max(took for _, took in answers)


def one_more(among: int, root: Path) -> float:
    """Median seconds of one more run beside `among` earlier ones."""
    experiment = root / "experiment"
    experiment.mkdir()
    for number in range(among):
        (experiment / f"RUN_20200101_{number // 10_000:06d}_{number % 10_000:06d}").mkdir()
    runmgr(root)  # the first one lists what is there
    times = []
    for _ in range(50):
        start = time.perf_counter()
        runmgr(root)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Run all contenders in turn, again and again, and print medians, spread, ratios and directories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--launches", type=int, default=64)
    arguments = parser.parse_args()
    all_contenders = contenders()
    slowest: dict[str, list[float]] = {name: [] for name in all_contenders}
    directories: dict[str, list[int]] = {name: [] for name in all_contenders}
    for _ in range(arguments.rounds):
        for name, create in all_contenders.items():
            with tempfile.TemporaryDirectory() as root:
                count, seconds = together(create, arguments.launches, Path(root))
            slowest[name].append(seconds * 1000)
            directories[name].append(count)
    limit = statistics.median(slowest["bare flock + mkdir"])
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, {arguments.rounds} interleaved rounds")
    print(f"\nslowest of {arguments.launches} launches at one instant")
    print(f"{'':<26}{'median ms':>10}{'quartiles':>16}{'ratio':>7}{'directories':>14}")
    for name, times in slowest.items():
        low, median, high = statistics.quantiles(times, n=4)
        counts = f"{min(directories[name])} to {max(directories[name])}"
        print(f"{name:<26}{median:>10.1f}{f'{low:.0f} to {high:.0f}':>16}{median / limit:>7.2f}{counts:>14}")
    print("\none more run beside earlier ones")
    for among in AMONG:
        with tempfile.TemporaryDirectory() as root:
            print(f"{among:>9,} runs{one_more(among, Path(root)) * 1000:>10.2f} ms")


if __name__ == "__main__":
    main()
