"""State → committed checkpoint, and back. The one place that calls torch.save and torch.load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch

from runmgr.disk import atomic, checkpoints
from runmgr.errors import CheckpointCorrupt, InvalidInput
from runmgr.worker import state as states
from runmgr.worker.averaging import BestAverage

if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping
    from pathlib import Path

    from runmgr.worker.averaging import Average

_SLICE_BYTES = 4 << 20


@dataclass(frozen=True)
class SaveHandle:
    """What `Run.save` returns. `checkpoint` is the committed one on rank 0, None on the others."""

    checkpoint: checkpoints.Checkpoint | None

    def wait(self) -> None:
        """Return when the checkpoint is durable, which a blocking save already is."""


class _Slices:
    """A file for torch.save that hands its bytes to the kernel in slices, so that other threads run in between.

    Unbuffered, it also lets an OSError through as itself, where torch.save on a path makes a RuntimeError of it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _SLICE_BYTES):
            atomic.write_all(self._descriptor, view[start : start + _SLICE_BYTES])
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""


def write_file(content: Mapping[str, Any], path: Path) -> None:
    """Write `content` to `path`, which appears whole, durable and read-only."""
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with atomic.new_file(path, mode=0o444) as descriptor:
            torch.save(content, cast("BinaryIO", _Slices(descriptor)))
    finally:
        torch.serialization.set_crc32_options(crc)


def load_file(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Load a file with `weights_only=True`; raises CheckpointCorrupt when it is no whole checkpoint."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointCorrupt(f"{path} cannot be loaded: {error}", path=str(path), reason=str(error)) from error


class Saver:
    """Writes this run's checkpoints. Rank 0 only."""

    def __init__(self, shelf: checkpoints.Shelf, run_id: str, logger: logging.Logger) -> None:
        self._shelf = shelf
        self._run_id = run_id
        self._logger = logger
        self._warned = False

    def save(
        self,
        state: Mapping[str, Any],
        *,
        epoch: int | None,
        step: int | None,
        metrics: dict[str, float],
        rng: list[dict[str, str]],
    ) -> checkpoints.Checkpoint:
        """Serialise once, commit, name; the averages' new members then share these bytes."""
        states.check_keys(state)
        self._check_monitor(metrics)
        plain = {key: value for key, value in state.items() if not isinstance(value, BestAverage)}
        gathered = states.gather(plain)
        bests = {key: value for key, value in state.items() if isinstance(value, BestAverage)}
        checkpoint = self._shelf.next(epoch=epoch, step=step, metrics=metrics)
        members: list[str] = []
        shared = []
        for key, average in bests.items():
            model_key = next((name for name, value in plain.items() if _is_model_of(average, value)), "")
            member = average.shared_member(gathered[model_key]) if model_key else None
            gathered[key] = average.state_dict(member, checkpoint.object_name, model_key)
            members += [entry["object"] for entry in gathered[key]["members"] if entry["object"]]
            if member is not None:
                shared.append((member, model_key))
        own = {"epoch": epoch, "step": step, "metrics": metrics, "run_id": self._run_id, "rng": rng}
        content = {key: gathered[key] for key in state} | own
        published = self._write(content, checkpoint, members)
        for member, model_key in shared:
            member.weights, member.object_name, member.key = None, checkpoint.object_name, model_key
            member.path = published.path_in(self._shelf.run)
        return published

    def save_average(self, average: Average) -> checkpoints.Checkpoint:
        """Write `average_model.pth`: {"net": …, "members": …}."""
        content = {
            "net": average._compute(states.module_state(average.model)),  # noqa: SLF001  # rank 0's part of it
            "members": average.describe(),
            "average": type(average).__name__,
            "run_id": self._run_id,
        }
        return self._write(content, self._shelf.next(kind="average"), [])

    def _write(
        self, content: Mapping[str, Any], checkpoint: checkpoints.Checkpoint, members: list[str]
    ) -> checkpoints.Checkpoint:
        import dataclasses

        start = time.perf_counter()
        write_file(content, checkpoint.path_in(self._shelf.run))
        checkpoint = dataclasses.replace(checkpoint, members=tuple(dict.fromkeys(members)))
        published = self._shelf.publish(checkpoint)
        self._logger.info(
            "saved %s: epoch %s, step %s, %.1f MB in %.2f s",
            ", ".join(published.names),
            published.epoch,
            published.step,
            published.size_bytes / 1e6,
            time.perf_counter() - start,
        )
        return published

    def _check_monitor(self, metrics: dict[str, float]) -> None:
        monitor = self._shelf.monitor
        if metrics and monitor is not None and monitor not in metrics and not self._warned:
            self._warned = True
            self._logger.warning(
                "save() got the metrics %s but not %r, which start_run(monitor=…) watches: such a save never becomes best",
                sorted(metrics),
                monitor,
            )


def _is_model_of(average: BestAverage, value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and states.unwrap(value) is average.model


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics as floats; one-element tensors and numpy scalars are fine."""
    found = {}
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"metrics[{name!r}]={value!r} is not one number: {error}") from None
    return found
