"""How long `start_run` takes as the ranks grow, against a barrier of the same size over the same store.

    python benchmarks/start.py [--simulated 2 16 128 1024] [--real 2 8 64] [--rounds 5]

Real: that many processes of this host call `start_run`, forked, with torch imported. Simulated: clients of a store, 64
threads in each of a few processes, that do what `start_run` does between the ranks (a session, the answer with the run, the
look at its directory), while rank 0 makes a real run. The store is torchrun's kind, in a process of its own. Barrier: each
client counts up one key and waits for another, which the last one sets; torch's barrier is that of torch.distributed.elastic,
whose clients block in the store. Time is from the common start to the slowest rank's end. Agreement: the part between the
ranks. All of a start also imports filelock, makes the run and asks git, on rank 0. Connecting to the store, which all ways
do alike, comes before: torch's store asks for the name of each client, one after the other, and where the resolver does
not answer that takes 5 s each. With "hosts: files" in /etc/nsswitch.conf it takes none.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils import store as elastic

import runmgr
from runmgr import opening, ranks
from runmgr.disk import directory
from runmgr.disk.shelf import Keep
from runmgr.worker import agreement, asking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.synchronize import Barrier

_THREADS = 64
_TIMEOUT_S = 120.0
_fork = multiprocessing.get_context("fork")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", type=int, nargs="*", default=[2, 16, 128, 1024])
    parser.add_argument("--real", type=int, nargs="*", default=[2, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print("| | ranks | torch's barrier ms | barrier ms | agreement ms | of a barrier | all of a start ms |")
    print("|---|---|---|---|---|---|---|")
    for kind, counts, threads in (("real", given.real, 1), ("simulated", given.simulated, _THREADS)):
        for world_size in counts:
            ways = (_torch_barrier, _barrier, _agree, _start_run if kind == "real" else _start)
            found = [[_timed(way, world_size, min(threads, world_size)) for way in ways] for _ in range(given.rounds)]
            medians = [f"{statistics.median(values) * 1e3:.1f}" for values in zip(*found, strict=True)]
            ratios = sorted(agreed / barrier for _, barrier, agreed, _ in found)
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {kind} | {world_size} | {' | '.join(medians[:3])} | {spread} | {medians[3]} |", flush=True)


def _timed(way: Callable[[int, int, int, Path], None], world_size: int, threads: int) -> float:
    """Return the seconds from the common start until every rank has ended `way`."""
    count = -(-world_size // threads)
    ready = _fork.Barrier(count + 1)
    ended: multiprocessing.Queue[float] = _fork.Queue()
    with tempfile.TemporaryDirectory() as folder, _store() as port:
        processes = [
            _fork.Process(
                target=_process,
                args=(
                    way,
                    range(first, min(first + threads, world_size)),
                    world_size,
                    port,
                    Path(folder),
                    ready,
                    ended,
                ),
            )
            for first in range(0, world_size, threads)
        ]
        for process in processes:
            process.start()
        ready.wait()
        start = time.monotonic()
        latest = max(ended.get(timeout=_TIMEOUT_S) for _ in processes)
        for process in processes:
            process.join()
    return latest - start


def _process(  # noqa: PLR0917  # called once, above
    way: Callable[[int, int, int, Path], None],
    numbers: range,
    world_size: int,
    port: int,
    folder: Path,
    ready: Barrier,
    ended: multiprocessing.Queue[float],
) -> None:
    os.environ |= {"RANK": str(numbers[0]), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(numbers[0])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    connected = threading.Barrier(len(numbers) + 1)
    begun = threading.Barrier(len(numbers) + 1)

    def one(rank: int) -> None:
        client = _client(port)  # at the same time, as it may take seconds
        connected.wait()
        begun.wait()
        way(rank, world_size, client, folder)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in numbers]
    for thread in threads:
        thread.start()
    connected.wait()
    ready.wait()
    begun.wait()
    for thread in threads:
        thread.join()
    ended.put(time.monotonic())


def _client(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=_TIMEOUT_S))


@contextlib.contextmanager
def _store() -> Iterator[int]:
    """Host a store in a process of its own, as torchrun's agent does."""
    ports: multiprocessing.Queue[int] = _fork.Queue()

    def host() -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports.put(store.port)
        signal.pause()

    process = _fork.Process(target=host)
    process.start()
    try:
        yield ports.get()
    finally:
        process.kill()
        process.join()


def _torch_barrier(_rank: int, world_size: int, store: dist.TCPStore, _: Path) -> None:
    elastic.barrier(store, world_size, "torch's barrier", _TIMEOUT_S)


def _barrier(_rank: int, world_size: int, store: dist.TCPStore, _: Path) -> None:
    if store.add("arrived", 1) == world_size:
        store.set("all here", "")
    assert asking.wait(store, ["all here"], _TIMEOUT_S, world_size)  # the same way of waiting


def _agree(rank: int, world_size: int, store: dist.TCPStore, folder: Path) -> None:
    """What start_run does between the ranks, without making a run."""
    _exchange(rank, world_size, store, lambda _: {"run_dir": str(folder), "token": "0" * 32})


def _start(rank: int, world_size: int, store: dist.TCPStore, folder: Path) -> None:
    """All of it, but for what belongs to a process of its own."""
    request = opening.Request(
        directory.Experiment(folder, "bench"), {}, [], "never", None, None, None, "max", Keep(), ()
    )
    _exchange(rank, world_size, store, lambda places: opening.open_run(request, places, _TIMEOUT_S)[0])


def _exchange(rank: int, world_size: int, store: dist.TCPStore, decide: Callable[[list[dict[str, Any]]], Any]) -> None:
    me = ranks.Ranks(rank, world_size, rank, f"host{rank // 8}", "the benchmark")
    joined = agreement.Agreement(me, store, _TIMEOUT_S)
    place = {"host": me.host, "rank": rank, "devices": [], "pid": rank, "pid_space": None, "launch": None}
    answer = joined.agree("create a run", decide, lambda: place)
    joined.agree("see the run directory", lambda _: None, lambda: os.path.isdir(answer["run_dir"]))


def _start_run(_rank: int, _world_size: int, store: dist.TCPStore, folder: Path) -> None:
    agreement._agent_clients["127.0.0.1", store.port] = store  # noqa: SLF001  # connected already
    with runmgr.start_run("bench", ckpt_root_dir=folder):
        pass


if __name__ == "__main__":
    main()
