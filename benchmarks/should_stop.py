"""What a call of should_stop() costs while no stop is pending, against the exchanges it does without.

    python benchmarks/should_stop.py [--ranks 2 8 64] [--rounds 5]

Real processes on this host. In each round every rank times 100 to 20,000 calls of each candidate in turn; a figure is the
median over rounds of rank 0's mean, in microseconds. With more ranks than cores the exchanges wait for the scheduler.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import runmgr

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue

_CALLS = {"runmgr, should_stop": 20_000, "one check of the store": 500, "all-reduce of a flag (gloo)": 100}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{'ranks':>5}  {'':<28}  {'median us':>9}  {'lowest to highest':>17}")
    for ranks in given.ranks:
        for name, values in _measure(ranks, given.rounds).items():
            print(f"{ranks:>5}  {name:<28}  {statistics.median(values):>9.2f}  {min(values):.2f} to {max(values):.2f}")


def _measure(ranks: int, rounds: int) -> dict[str, list[float]]:
    context = multiprocessing.get_context("fork")
    answers: Queue[dict[str, list[float]]] = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, rounds, port, folder, answers)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found = answers.get(timeout=300)
        for process in processes:
            process.join()
    return found


def _rank(  # noqa: PLR0917  # called once, above
    rank: int, ranks: int, rounds: int, port: int, folder: str, answers: Queue[dict[str, list[float]]]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the log of 64 ranks
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  # what a run without a group would ask
    flag = torch.zeros(1)
    with runmgr.start_run("bench", ckpt_root_dir=folder) as run:
        candidates: dict[str, Callable[[], object]] = {
            "runmgr, should_stop": run.should_stop,
            "one check of the store": lambda: store.check(["stop"]),
            "all-reduce of a flag (gloo)": lambda: dist.all_reduce(flag),
        }
        micros: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, call in candidates.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(_CALLS[name]):
                    call()
                micros[name].append((time.perf_counter() - start) / _CALLS[name] * 1e6)
        dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answers.put(micros)


if __name__ == "__main__":
    main()
