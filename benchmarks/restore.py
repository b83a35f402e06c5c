"""What it costs many ranks of one host to restore one checkpoint, and how much memory each of them needs.

    python benchmarks/restore.py [--size-mib 512] [--ranks 8] [--rounds 5] [--folder F]

Four ways, in turn, in a new order each round, with the file in the page cache ("warm") and without ("cold"): runmgr, which
checks every byte; each rank with a `torch.load` of its own, plain or mapped, unchecked; rank 0 with `torch.load`, then a gloo
broadcast of each tensor, unchecked. And, as the limit, each rank that only reads the bytes. Seconds are those of the slowest
rank. Memory is over what the rank had before: peak of the anonymous pages, and of the proportional share (PSS, in which a page
that eight ranks map counts an eighth for each).
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import multiprocessing

import runmgr

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_SAMPLE_S = 0.05
_CHUNK_BYTES = 1 << 20


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--tensor-mib", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the run lies (a temporary directory)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        multiprocessing.spawn(_rank, (given, folder), nprocs=given.ranks)


def _rank(rank: int, given: argparse.Namespace, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(given.ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=given.ranks)
    count = given.size_mib // given.tensor_mib
    model = torch.nn.ParameterDict(
        {
            f"layer{index}": torch.nn.Parameter(torch.zeros(given.tensor_mib << 18), requires_grad=False)
            for index in range(count)
        }
    )
    with runmgr.start_run("bench", ckpt_root_dir=Path(folder) / "runs") as run:
        for parameter in model.parameters():
            parameter.fill_(1.0)
        run.save({"net": model}, epoch=1)
        path = run.path("latest")
        ways: dict[str, Callable[[], object]] = {
            "only read the bytes": lambda: _read(path),
            "runmgr restore, checked": lambda: run.restore({"net": model}),
            "torch.load on each rank": lambda: model.load_state_dict(torch.load(path)["net"]),
            "torch.load(mmap=True) on each": lambda: model.load_state_dict(torch.load(path, mmap=True)["net"]),
            "rank 0 loads and broadcasts": lambda: _broadcast(model, path),
        }
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        dice = random.Random(0)
        for turn in range(given.rounds + 1):
            for temperature in ("warm", "cold"):
                for name in dice.sample(list(ways), len(ways)):
                    _set_temperature(path, temperature, rank)
                    measured = _measure(ways[name])
                    assert name == "only read the bytes" or all(parameter[0] == 1 for parameter in model.parameters())
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.zero_()
                    everyone: list[tuple[float, float, float]] = [measured] * given.ranks
                    dist.all_gather_object(everyone, measured)
                    worst = tuple(max(column) for column in zip(*everyone, strict=True))
                    if turn:  # the first round warms up
                        found.setdefault((name, temperature), []).append(worst)  # type: ignore[arg-type]
    if rank == 0:
        _report(found, given)
    dist.barrier()
    dist.destroy_process_group()


def _broadcast(model: nn.Module, path: Path) -> None:
    if dist.get_rank() == 0:
        model.load_state_dict(torch.load(path)["net"])
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


def _set_temperature(path: Path, temperature: str, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if temperature == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            _read(path)
        os.close(descriptor)
        time.sleep(0.2)
    dist.barrier()


def _read(path: Path) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _measure(way: Callable[[], object]) -> tuple[float, float, float]:
    """Return seconds until the last rank is done, and the peaks of anonymous and proportional memory in MiB."""
    ended, peaks, before = threading.Event(), [0.0, 0.0], _memory_mib()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            for index, value in enumerate(_memory_mib()):
                peaks[index] = max(peaks[index], value - before[index])

    sampler = threading.Thread(target=watch)
    sampler.start()
    start = time.perf_counter()
    way()
    seconds = time.perf_counter() - start
    ended.set()
    sampler.join()
    return seconds, *peaks  # type: ignore[return-value]


def _memory_mib() -> tuple[float, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("Anonymous", "Pss"))  # type: ignore[return-value]


def _report(found: dict[tuple[str, str], list[tuple[float, float, float]]], given: argparse.Namespace) -> None:
    print(f"{given.ranks} ranks, {given.size_mib} MiB in tensors of {given.tensor_mib} MiB, {given.rounds} rounds")
    print("| | | median s | ratio to torch.load | quartiles | anonymous MiB | PSS MiB |\n|---|---|---|---|---|---|---|")
    for (name, temperature), values in found.items():
        base = [seconds for seconds, _, _ in found["torch.load on each rank", temperature]]
        ratios = [seconds / other for (seconds, _, _), other in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median, anonymous, share = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"| {name} | {temperature} | {median:.2f} | {middle:.2f} | {low:.2f} to {high:.2f} "
            f"| {anonymous:.0f} | {share:.0f} |"
        )


if __name__ == "__main__":
    main()
