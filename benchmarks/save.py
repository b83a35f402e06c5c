"""What a durable save costs against the raw disk and against what people use today.

    python benchmarks/save.py [--size-mib 64 512] [--pairs 15] [--without-peers]

Every candidate ends with its bytes on disk (fsync, but for torch.save as super-gradients calls it). The candidates run
in turn in each round, in a new order, with disk and memory settled in between; figures are medians of ratios to the same
round's raw write (4 MiB os.write) and one fsync. Settled memory: a virtual machine hands pages that were freed back to its
host, and touching one again costs more than writing it to the disk, so enough of them are touched ahead of each candidate.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp

import runmgr
from runmgr import start
from runmgr.disk import atomic

if TYPE_CHECKING:
    from collections.abc import Callable

_SLICE_BYTES = 4 << 20
_TENSOR_BYTES = 8 << 20
_LATEST = "runmgr, latest"
_ALL_NAMES = "runmgr, latest + best + epoch + member"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--without-peers", action="store_true", help="only the raw disk and runmgr: much faster")
    parser.add_argument("--folder", default=None, help="where to write (a temporary directory)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for size_mib in given.size_mib:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            _measure(Path(folder), size_mib << 20, given.pairs, with_peers=not given.without_peers)


def _measure(folder: Path, size_bytes: int, pairs: int, *, with_peers: bool) -> None:
    state = {f"layer{index}": torch.rand(_TENSOR_BYTES // 4) for index in range(size_bytes // _TENSOR_BYTES)}
    model = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(value, requires_grad=False) for name, value in state.items()}
    )
    average = runmgr.BestAverage(model, k=1)
    # Each save drops one file: a name for the epoch comes with last=2.
    plain = runmgr.start_run("plain", ckpt_root_dir=folder / "runs")
    start._open_run = None  # noqa: SLF001  # only one may be open, but the two take turns here
    run = runmgr.start_run("bench", ckpt_root_dir=folder / "runs", monitor="acc", keep=runmgr.Keep(last=2))

    def save_with_all_names(turn: int) -> None:
        run.save({"net": model, "average": average}, epoch=turn, metrics={"acc": turn})

    candidates: dict[str, Callable[[int], object]] = {
        "raw write + fsync": lambda _: _raw(folder / "raw.bin", state),
        _LATEST: lambda turn: plain.save({"net": model}, epoch=turn),
        _ALL_NAMES: save_with_all_names,
    }
    peers: dict[str, Callable[[int], object]] = {
        "torch.save + fsync + replace": lambda _: _torch_durable(folder / "torch.pth", state),
        "torch.save x 3, no fsync": lambda _: [torch.save(state, folder / f"plain{number}.pth") for number in range(3)],
        "DCP save": lambda _: _dcp(state, folder / "dcp"),
    }
    if with_peers:
        candidates |= peers
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    written: dict[str, int] = {}
    dice = random.Random(0)
    for turn in range(1, pairs + 2):
        for name in dice.sample(list(candidates), len(candidates)):
            if name == _ALL_NAMES:
                average.update(float(turn))
            _settle(2 * size_bytes)
            before, began = _written_bytes(), time.perf_counter()
            candidates[name](turn)
            if turn > 1:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
                written[name] = _written_bytes() - before
    file_bytes = run.path("latest").stat().st_size
    run.finish()
    plain.finish()
    print(f"\n{size_bytes >> 20} MiB, {pairs} rounds, file of {file_bytes} bytes")
    print("| | median s | ratio to raw | quartiles | bytes written / file |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / raw for value, raw in zip(values, seconds["raw write + fsync"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {statistics.median(values):.3f} | {middle:.2f} | {low:.2f} to {high:.2f} | "
            f"{written[name] / file_bytes:.3f} |"
        )
    low, middle, high = statistics.quantiles(
        [all_names / latest for all_names, latest in zip(seconds[_ALL_NAMES], seconds[_LATEST], strict=True)], n=4
    )
    print(f"all names against latest: {middle:.2f} ({low:.2f} to {high:.2f})")


def _settle(size_bytes: int) -> None:
    os.sync()
    torch.empty(size_bytes, dtype=torch.uint8)[::4096].fill_(1)
    os.sync()
    time.sleep(0.1)


def _raw(path: Path, state: dict[str, torch.Tensor]) -> None:
    descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for tensor in state.values():
        view = memoryview(tensor.numpy()).cast("B")
        for offset in range(0, len(view), _SLICE_BYTES):
            atomic.write_all(descriptor, view[offset : offset + _SLICE_BYTES])
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(path.with_suffix(".new"), path)  # the peer's own way


def _torch_durable(path: Path, state: dict[str, torch.Tensor]) -> None:
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)  # the peer's own way
    atomic.sync_directory(path.parent)


def _dcp(state: dict[str, torch.Tensor], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)


def _written_bytes() -> int:
    """Return the bytes that this process has handed to write() so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no wchar")


if __name__ == "__main__":
    main()
