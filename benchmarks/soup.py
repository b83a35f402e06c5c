"""What averaging checkpoints on disk costs, against only reading them and against adding up what torch.load gives.

    python benchmarks/soup.py [--members 10] [--size-mib 256] [--tensor-mib 16] [--dtype float32] [--rounds 5] [--folder F]
    python benchmarks/soup.py --size-mib 2048 --memory-mib 3072 --rounds 3      # as root: in a control group, 20 GB of disk

Three ways, in turn, in a new order each round, each in a process of its own that has loaded torch before the clock starts:
the files read once, 1 MiB at a time, by four threads; runmgr; `torch.load` of one file after the other, added up in float64,
and `torch.save`. Before each the page cache forgets the files, unless `--warm`. With `--memory-mib` all of it is done in a
control group with so much memory, page cache included; a way that the kernel kills for it is shown so. Memory is the peak of
the process's own pages over what it had before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 1 << 20
_THREADS = 4


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--size-mib", type=int, default=256, help="of each member")
    parser.add_argument("--tensor-mib", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--memory-mib", type=int, default=0, help="of the control group; needs root")
    parser.add_argument("--folder", default=None, help="where the checkpoints lie (a temporary directory)")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--group", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        _measure(given)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, _control_group(given.memory_mib) as group:
        paths = _make(given, Path(folder))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in _WAYS}
        dice = random.Random(0)
        for turn in range(given.rounds + 1):
            for name in dice.sample(list(_WAYS), len(_WAYS)):
                _forget(paths, is_warm=given.warm)
                result = _run(name, given, folder, group)
                if turn:  # the first round warms up
                    found[name].append(result)
        _report(found, given, sum(path.stat().st_size for path in paths))


def _make(given: argparse.Namespace, folder: Path) -> list[Path]:
    dtype = getattr(torch, given.dtype)
    numel = given.tensor_mib * (1 << 20) // dtype.itemsize
    paths = []
    for number in range(given.members):
        torch.manual_seed(number)
        state = {f"layer{index}": torch.randn(numel).to(dtype) for index in range(given.size_mib // given.tensor_mib)}
        paths.append(folder / f"member{number}.pth")
        torch.save({"net": state, "epoch": number}, paths[-1])
        descriptor = os.open(paths[-1], os.O_RDONLY)
        os.fdatasync(descriptor)
        os.close(descriptor)
    return paths


def _read(paths: list[Path], _given: argparse.Namespace) -> None:
    def read(path: Path) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, paths))


def _average(paths: list[Path], given: argparse.Namespace) -> None:
    import runmgr

    runmgr.average_checkpoints(paths, paths[0].parent / "soup.pth", device=given.device, overwrite=True)


def _load_and_add(paths: list[Path], given: argparse.Namespace) -> None:
    sums: dict[str, torch.Tensor] = {}
    for path in paths:
        for key, tensor in torch.load(path, map_location=given.device, weights_only=True)["net"].items():
            sums[key] = sums[key].add_(tensor) if key in sums else tensor.double()
    dtype = getattr(torch, given.dtype)
    torch.save(
        {"net": {key: (total / len(paths)).to(dtype) for key, total in sums.items()}}, paths[0].parent / "naive.pth"
    )


_WAYS = {"only read the files": _read, "runmgr, checked and durable": _average, "torch.load and add": _load_and_add}


def _run(name: str, given: argparse.Namespace, folder: str, group: str) -> dict[str, float]:
    arguments = [f"--{option}={getattr(given, option)}" for option in ("device", "dtype")]
    command = [sys.executable, __file__, "--way", name, "--folder", folder, "--group", group, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def _measure(given: argparse.Namespace) -> None:
    """Be the process of one way: load everything, join the control group, then measure."""
    import runmgr.worker.soup  # noqa: F401  # its import is not what is measured

    paths = sorted(Path(given.folder).glob("member*.pth"))
    if given.group:
        Path(given.group, "cgroup.procs").write_text(str(os.getpid()))
    before, cpu_before, start = _anonymous_mib(), time.process_time(), time.perf_counter()
    _WAYS[given.way](paths, given)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_before
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": _anonymous_mib() - before}))


def _anonymous_mib() -> float:
    """Return the highest that this process's memory was, without what it mapped of files, as far as the kernel says."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) / 1024


def _forget(paths: list[Path], *, is_warm: bool) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if is_warm:
                while file.read(_CHUNK_BYTES):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _control_group(memory_mib: int) -> Iterator[str]:
    """Yield the folder of a control group, of version 1 or 2, with so much memory; nothing without a limit."""
    if not memory_mib:
        yield ""
        return
    top = Path("/sys/fs/cgroup")
    is_first = (top / "memory").is_dir()
    group = (top / "memory" if is_first else top) / f"soup-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(memory_mib << 20))
        yield str(group)
    finally:
        group.rmdir()


def _report(found: dict[str, list[dict[str, float]]], given: argparse.Namespace, size_bytes: int) -> None:
    limit = f", in {given.memory_mib} MiB of memory" if given.memory_mib else ""
    where = "in" if given.warm else "not in"
    print(
        f"{given.members} members of {given.size_mib} MiB, tensors of {given.tensor_mib} MiB, {given.dtype}, {given.device}, "
        f"{given.rounds} rounds, {where} the page cache{limit}; torch {torch.__version__}"
    )
    print(f"{'':<28} {'median s':>9} {'GB/s':>6} {'speed':>6}  {'quartiles':<13} {'CPU s':>6} {'MiB':>6}")
    base = [result["seconds"] for result in found["only read the files"]]
    for name, results in found.items():
        if not all(results):
            print(f"{name:<28} killed for its memory")
            continue
        seconds = [result["seconds"] for result in results]
        speeds = [reading / other for reading, other in zip(base, seconds, strict=True)]
        low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
        median = statistics.median(seconds)
        print(
            f"{name:<28} {median:9.2f} {size_bytes / 1e9 / median:6.2f} {middle:6.2f}  {f'{low:.2f} to {high:.2f}':<13} "
            f"{statistics.median(result['cpu'] for result in results):6.1f} "
            f"{statistics.median(result['mib'] for result in results):6.0f}"
        )


if __name__ == "__main__":
    main()
