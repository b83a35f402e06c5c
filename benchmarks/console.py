"""What capture_console costs a training step at 100,000 lines a second.

    python benchmarks/console.py [--rounds 15] [--steps 50] [--terminal]

A step is 7 ms of matrix products and 1,000 lines of 60 bytes, so there are more than 100,000 lines a second on a quiet
machine. In each round every way to print is measured without and with capture, in changing order; figures are medians
over rounds of a round's median step. Standard output leads to a file, as in a batch job, or with --terminal to a
pseudo-terminal that a process reads.
"""

from __future__ import annotations

import argparse
import logging
import os
import pty
import statistics
import sys
import tempfile
import time
import tty
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

import runmgr

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

_LINES_A_STEP = 1000
_LINE = "x" * 59
_COMPUTE_S = 0.007


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--terminal", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    shown = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryDirectory() as folder:
        os.dup2(_terminal() if given.terminal else os.open(f"{folder}/out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        measured = _measure(given.rounds, given.steps, folder)
    shown.write(
        f"{'1,000 lines a step':<36}{'ms without':>11}{'ms with':>9}{'ratio':>8}{'quartiles':>17}{'lines/s':>10}\n"
    )
    for name, pairs in measured.items():
        without, with_ = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = [after / before for before, after in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        shown.write(
            f"{name:<36}{without:>11.2f}{with_:>9.2f}{statistics.median(ratios):>8.3f}"
            f"{f'{low:.3f} to {high:.3f}':>17}{_LINES_A_STEP / with_ * 1e3:>10,.0f}\n"
        )
    shown.close()


def _terminal() -> int:
    """Return a terminal whose other end a process reads, as a terminal's window does."""
    reading, writing = pty.openpty()
    tty.setraw(writing)
    if not os.fork():
        os.close(writing)
        try:
            while os.read(reading, 1 << 16):
                pass
        except OSError:
            pass
        os._exit(0)
    os.close(reading)
    return writing


def _measure(rounds: int, steps: int, folder: str) -> dict[str, list[tuple[float, float]]]:
    in_lines = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    in_blocks = open(1, "w", closefd=False)  # noqa: SIM115
    ways: dict[str, tuple[io.TextIOWrapper, Callable[[], None]]] = {
        "write(), as C++ does": (in_lines, _write),
        "print(), line by line (python -u)": (in_lines, _print),
        "print(), before in blocks of 8 KiB": (in_blocks, _print),
        "nothing": (in_lines, lambda: None),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    products = _products()
    for number in range(rounds):
        for name, (sys.stdout, emit) in ways.items():
            order = (False, True) if number % 2 else (True, False)
            times = {captured: _steps(steps, products, emit, folder, captured=captured) for captured in order}
            found[name].append((times[False], times[True]))
    return found


def _write() -> None:
    line = f"{_LINE}\n".encode()
    for _ in range(_LINES_A_STEP):
        os.write(1, line)


def _print() -> None:
    for _ in range(_LINES_A_STEP):
        print(_LINE)


def _products() -> int:
    """Return how many matrix products make up the rest of a step."""
    matrix = torch.ones(256, 256)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return max(1, round(_COMPUTE_S / statistics.median(times)))


def _steps(steps: int, products: int, emit: Callable[[], None], folder: str, *, captured: bool) -> float:
    """Return the median step in milliseconds."""
    matrix = torch.ones(256, 256)
    times = []
    run = runmgr.start_run("bench", ckpt_root_dir=folder, capture_console=True, resume="never") if captured else None
    with run or nullcontext():
        for _ in range(steps):
            start = time.perf_counter()
            emit()
            for _ in range(products):
                matrix @ matrix
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
