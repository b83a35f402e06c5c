"""What a background save costs the training: how long it stalls, and how much slower the steps are while it is written.

    python benchmarks/async_save.py [--size-mib 512] [--tensor-mib 8] [--rounds 7] [--device cuda]

Stall: the call's own time, against a memcpy of the same bytes into warm memory in the same round; with `--device cuda` into
warm pinned memory, so that the ratio is to the device-to-host bandwidth. Steps: a loop of matrix products (on a CPU small
ones in one compute thread), counted while the write goes on, against the steps beside a thread that writes the same bytes
raw and, last column, against those of a second without any writer. `AsyncCheckpointIO` is measured where Lightning is
installed; it and the plain thread do not sync to disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp

import runmgr
from runmgr.disk import atomic

if TYPE_CHECKING:
    from collections.abc import Callable

_SLICE_BYTES = 4 << 20


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--tensor-mib", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where the state lies and the steps run")
    parser.add_argument("--folder", default=None, help="where to write (a temporary directory)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for tensor_mib in given.tensor_mib:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            _measure(Path(folder), given.size_mib, tensor_mib, given.rounds, torch.device(given.device))


def _measure(folder: Path, size_mib: int, tensor_mib: int, rounds: int, device: torch.device) -> None:
    state = {f"layer{index}": torch.rand(tensor_mib << 18, device=device) for index in range(size_mib // tensor_mib)}
    host = {name: tensor.cpu() for name, tensor in state.items()}
    on_gpu = device.type == "cuda"
    module = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    )
    warm = [torch.empty_like(tensor, pin_memory=on_gpu).fill_(0) for tensor in host.values()]
    stalls: dict[str, list[float]] = {}
    with runmgr.start_run("bench", ckpt_root_dir=folder / "runs") as run:
        run.restore({"net": module})
        time.sleep(2)  # the first epoch would take longer

        def background(turn: int) -> Callable[[], bool]:
            handle = run.save({"net": module}, step=turn, block=False)
            return lambda: handle.is_done

        def copy() -> Callable[[], bool]:
            for target, tensor in zip(warm, state.values(), strict=True):
                target.copy_(tensor, non_blocking=True)
            _synchronize(device)
            return lambda: True

        def nothing() -> Callable[[], bool]:
            end = time.perf_counter() + 1
            return lambda: time.perf_counter() > end

        writers: dict[str, Callable[[int], Callable[[], bool]]] = {
            "memcpy": lambda _: copy(),
            "no writer": lambda _: nothing(),
            "raw writes in a thread": lambda _: _in_thread(lambda: _raw(folder / "raw.bin", host)),
            "runmgr, block=False": background,
            "torch.save(path) in a thread": lambda _: _in_thread(lambda: torch.save(state, folder / "torch.pth")),
            "DCP async_save": lambda _: dcp.async_save(state, checkpoint_id=str(folder / "dcp"), no_dist=True).done,
        }
        if (lightning := _lightning()) is not None:
            writers["Lightning AsyncCheckpointIO"] = lambda _: lightning(state, folder / "lightning.ckpt")
        rates: dict[str, list[float]] = {name: [] for name in writers}
        worst: dict[str, list[float]] = {name: [] for name in writers}
        dice = random.Random(0)
        for turn in range(1, rounds + 1):
            for name in dice.sample(list(writers), len(writers)):
                shutil.rmtree(folder / "dcp", ignore_errors=True)
                os.sync()
                time.sleep(0.3)
                _synchronize(device)
                start = time.perf_counter()
                is_done = writers[name](turn)
                stalls.setdefault(name, []).append(time.perf_counter() - start)
                steps_a_second, longest = _train(is_done, device)
                rates[name].append(steps_a_second)
                worst[name].append(longest)
    copies = stalls["memcpy"]
    print(
        f"\n{size_mib} MiB in tensors of {tensor_mib} MiB, {rounds} rounds, memcpy {statistics.median(copies) * 1e3:.0f} ms"
    )
    print("| | stall / memcpy | first | steps against raw | worst step ms, median | steps against none |")
    print("|---|---|---|---|---|---|")
    for name in list(writers)[2:]:
        waits = [stall / copy for stall, copy in zip(stalls[name], copies, strict=True)]
        ratios = [rate / raw for rate, raw in zip(rates[name], rates["raw writes in a thread"], strict=True)]
        print(
            f"| {name} | {statistics.median(waits):.2f} ({min(waits):.2f} to {max(waits):.2f}) | {waits[0]:.2f} ",
            end="",
        )
        print(f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) ", end="")
        free = [rate / alone for rate, alone in zip(rates[name], rates["no writer"], strict=True)]
        print(f"| {statistics.median(worst[name]) * 1e3:.1f} | {statistics.median(free):.2f} |")


def _lightning() -> Callable[[object, Path], Callable[[], bool]] | None:
    try:
        from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
    except ImportError:
        return None
    plugin = AsyncCheckpointIO(TorchCheckpointIO())

    def save(state: object, path: Path) -> Callable[[], bool]:
        plugin.save_checkpoint(state, path)
        return plugin._executor.submit(lambda: None).done  # noqa: SLF001  # its only thread comes to this when it has saved

    return save


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train(is_done: Callable[[], bool], device: torch.device) -> tuple[float, float]:
    size = 4096 if device.type == "cuda" else 256
    matrix = torch.rand(size, size, device=device)
    count, longest, start = 0, 0.0, time.perf_counter()
    while not is_done():
        before = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        longest = max(longest, time.perf_counter() - before)
        count += 1
    return count / (time.perf_counter() - start), longest


def _in_thread(function: Callable[[], None]) -> Callable[[], bool]:
    thread = threading.Thread(target=function)
    thread.start()
    return lambda: not thread.is_alive()


def _raw(path: Path, state: dict[str, torch.Tensor]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for tensor in state.values():
        view = memoryview(tensor.numpy()).cast("B")
        for start in range(0, len(view), _SLICE_BYTES):
            atomic.write_all(descriptor, view[start : start + _SLICE_BYTES])
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    main()
