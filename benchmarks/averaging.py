"""What an average costs: the best ten states an epoch, exponential and running averages an update.

    python benchmarks/averaging.py [--size-mib 16 256 2048] [--rounds 7] [--device cuda] [--dtype float32]

What is compared runs in turn, in a new order each round. An epoch of the best ten is `update()` and the comparison that
the next save makes, when the state enters and when it does not; "and the average" asks for it each time. super-gradients'
scheme, written anew from its description: read a pickle of ten models, replace the worst and write it back if the state
enters, average them on the CPU in the model's dtype, write the average. It is left out above `--scheme-mib`.

An update's bandwidth is the bytes that it must read and write (an exponential average 3 models, a running one with float64 sums
5 of float32) over its time, as a share of what a device copy of one stretch of bytes reaches in the same round: that is the
limit. On a GPU the last column is how much longer a step of matrix products (about `--step-ms`) takes with an update behind it,
and a last table the same of ten steps in a row, also with averages that were made with `overlap_with=optimizer`.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import runmgr

if TYPE_CHECKING:
    from collections.abc import Callable

_MEMBERS = 10
_DECAY = 0.999
_STEPS = 10


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, nargs="+", default=[16, 64, 256, 1024, 2048])
    parser.add_argument("--tensor-mib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scheme-mib", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=50)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--folder", default=None, help="where super-gradients' scheme and the run write")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    logging.disable(logging.WARNING)
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    for size_mib in given.size_mib:
        model = _model(size_mib, given.tensor_mib, getattr(torch, given.dtype), device)
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            _best(model, size_mib, given, Path(folder))
        _updates(model, size_mib, given)
        if device.type == "cuda":
            _overlapped(model, size_mib, given)


def _model(size_mib: int, tensor_mib: float, dtype: torch.dtype, device: torch.device) -> nn.Module:
    length = int(tensor_mib * (1 << 20)) // dtype.itemsize
    tensors = [torch.randn(length, device=device).to(dtype) for _ in range(max(int(size_mib / tensor_mib), 1))]
    return nn.ParameterDict({f"layer{number}": nn.Parameter(tensor) for number, tensor in enumerate(tensors)})


def _best(model: nn.Module, size_mib: int, given: argparse.Namespace, folder: Path) -> None:
    names = ["runmgr", "runmgr and the average", "device copy"]
    with runmgr.start_run("bench", ckpt_root_dir=folder / "runs") as run:
        averages = {name: runmgr.BestAverage(model, k=_MEMBERS) for name in names[:2]}
        metrics = dict.fromkeys(names[:2], 0.0)
        for _ in range(_MEMBERS):
            for name, average in averages.items():
                metrics[name] += 1
                average.update(metrics[name])
            run.save({"net": model, **averages}, step=int(metrics["runmgr"]))
        averages[names[1]].averaged_state_dict()

        def epoch(name: str, enters: bool) -> None:  # noqa: FBT001  # a row and a column of the table
            average = averages[name]
            metrics[name] += enters
            average.update(metrics[name] if enters else 0.0)
            average.held_for("net")
            if name != "runmgr":
                average.averaged_state_dict()

        target = {key: torch.empty_like(tensor) for key, tensor in model.state_dict().items()}
        ways: dict[str, Callable[[bool], object]] = {
            name: lambda enters, name=name: epoch(name, enters) for name in names[:2]
        }
        ways["device copy"] = lambda _: [target[key].copy_(tensor) for key, tensor in model.state_dict().items()]
        if size_mib <= given.scheme_mib:
            scheme = _Scheme(folder, model)
            ways["super-gradients' scheme"] = lambda enters: scheme.epoch(model, enters=enters)
        times: dict[tuple[str, bool], list[float]] = {}
        dice = random.Random(0)
        for turn in range(given.rounds + 1):
            for name in dice.sample(list(ways), len(ways)):
                times.setdefault((name, True), []).append(_seconds(lambda way=ways[name]: way(True), given.device))
            run.save({"net": model, **averages}, step=100 + turn)  # whose bytes the new members share from then on
            for name in dice.sample(list(ways), len(ways)):
                times.setdefault((name, False), []).append(_seconds(lambda way=ways[name]: way(False), given.device))
    print(f"\nbest {_MEMBERS} of {size_mib} MiB, {given.rounds} rounds: an epoch")
    print("| | enters, ms | does not, ms | of the scheme's |")
    print("|---|---|---|---|")
    base = "super-gradients' scheme" if size_mib <= given.scheme_mib else None
    for name in ways:
        shares = [
            f"1/{statistics.median(times[base, enters][1:]) / statistics.median(times[name, enters][1:]):.0f}"
            if base
            else "-"
            for enters in (True, False)
        ]
        print(f"| {name} | {_shown(times[name, True])} | {_shown(times[name, False])} | {', '.join(shares)} |")


class _Scheme:
    """Ten models in one pickle, read each epoch."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._file, self._average = folder / "snapshots.pkl", folder / "average.pth"
        snapshots = {
            number: {key: tensor.cpu() for key, tensor in model.state_dict().items()} for number in range(_MEMBERS)
        }
        torch.save({"snapshots": snapshots, "metrics": list(range(_MEMBERS))}, self._file)

    def epoch(self, model: nn.Module, *, enters: bool) -> None:
        found = torch.load(self._file, weights_only=True)
        snapshots, metrics = found["snapshots"], found["metrics"]
        if enters:
            worst = metrics.index(min(metrics))
            snapshots[worst] = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
            metrics[worst] = max(metrics) + 1
            torch.save(found, self._file)
        average = {
            key: torch.stack([snapshots[number][key] for number in range(_MEMBERS)]).mean(0) for key in snapshots[0]
        }
        torch.save({"net": average}, self._average)


@torch.no_grad()
def _updates(model: nn.Module, size_mib: int, given: argparse.Namespace) -> None:
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    wide, single = 8 / model["layer0"].element_size(), max(4 / model["layer0"].element_size(), 1)
    bytes_from, bytes_to = (torch.zeros(size_bytes, dtype=torch.uint8, device=given.device) for _ in range(2))
    plain = [parameter.detach().clone() for parameter in model.parameters()]
    exponential, running = runmgr.ExponentialAverage(model, _DECAY), runmgr.RunningAverage(model)
    narrow = runmgr.RunningAverage(model, dtype=torch.float32)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    swa = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "device copy": (lambda: bytes_to.copy_(bytes_from), 2),
        "runmgr exponential": (exponential.update, 1 + 2 * single),
        "AveragedModel exponential": (lambda: ema.update_parameters(model), 3),
        "plain loop exponential": (lambda: _plain_loop(plain, model), 3),
        "runmgr running": (running.update, 1 + 2 * wide),
        "runmgr running, float32 sums": (narrow.update, 1 + 2 * single),
        "AveragedModel running": (lambda: swa.update_parameters(model), 3),
    }
    for update, _ in ways.values():
        update()
    step = _step(given)
    times: dict[str, list[float]] = {name: [] for name in ways}
    longer: dict[str, list[float]] = {name: [] for name in ways}
    dice = random.Random(0)
    for _ in range(given.rounds + 1):
        for name in dice.sample(list(ways), len(ways)):
            update = ways[name][0]
            times[name].append(_seconds(update, given.device))
            if step is not None:
                alone, both = (
                    _seconds(step, given.device),
                    _seconds(lambda update=update: (step(), update()), given.device),
                )
                longer[name].append(both / alone - 1)
    print(f"\nupdates of {size_mib} MiB in {given.dtype}, {given.rounds} rounds")
    print("| | ms | bandwidth of a copy's | step longer by |")
    print("|---|---|---|---|")
    for name, (_, models) in ways.items():
        pairs = zip(times[name][1:], times["device copy"][1:], strict=True)
        share = statistics.median(models / 2 * copy / own for own, copy in pairs)
        told = f"{statistics.median(longer[name][1:]):.1%}" if longer[name] else "-"
        print(f"| {name} | {_shown(times[name])} | {share:.0%} | {told} |")
    print(f"a copy: {2 * size_bytes / statistics.median(times['device copy'][1:]) / 1e9:.1f} GB/s read and written")


def _overlapped(model: nn.Module, size_mib: int, given: argparse.Namespace) -> None:
    optimizer = torch.optim.SGD(model.parameters())  # there are no gradients: its step does nothing but wait
    ways: dict[str, Callable[[], object]] = {"no average": lambda: None}
    for name, more in (("", {}), (", overlapped", {"overlap_with": optimizer})):
        ways[f"exponential{name}"] = runmgr.ExponentialAverage(model, _DECAY, **more).update
        ways[f"running{name}"] = runmgr.RunningAverage(model, **more).update
    step = _step(given) or (lambda: None)

    def train(update: Callable[[], object]) -> None:
        for _ in range(_STEPS):
            step()
            optimizer.step()
            update()

    times: dict[str, list[float]] = {name: [] for name in ways}
    dice = random.Random(0)
    for _ in range(given.rounds + 1):
        for name in dice.sample(list(ways), len(ways)):
            times[name].append(_seconds(lambda name=name: train(ways[name]), given.device))
    print(f"\n{_STEPS} steps with an update of {size_mib} MiB in {given.dtype} behind each, {given.rounds} rounds")
    print("| | ms | longer by |")
    print("|---|---|---|")
    for name, found in times.items():
        pairs = zip(found[1:], times["no average"][1:], strict=True)
        print(f"| {name} | {_shown(found)} | {statistics.median(own / alone - 1 for own, alone in pairs):.1%} |")


def _plain_loop(averages: list[torch.Tensor], model: nn.Module) -> None:
    for average, parameter in zip(averages, model.parameters(), strict=True):
        average.lerp_(parameter, 1 - _DECAY)


def _step(given: argparse.Namespace) -> Callable[[], object] | None:
    """Return something that keeps a GPU busy for about as long as was asked for."""
    if given.device == "cpu":
        return None
    matrix = torch.randn(8192, 8192, device=given.device, dtype=torch.bfloat16)
    for _ in range(3):
        once = _seconds(lambda: matrix @ matrix, given.device)
    count = max(int(given.step_ms / 1e3 / once), 1)
    return lambda: [matrix @ matrix for _ in range(count)]


def _seconds(action: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _shown(seconds: list[float]) -> str:
    """Show median, least and greatest without the first, which warms up."""
    kept = sorted(seconds[1:])
    return f"{statistics.median(kept) * 1e3:.3g} ({kept[0] * 1e3:.3g} to {kept[-1] * 1e3:.3g})"


if __name__ == "__main__":
    main()
