"""State → committed checkpoint, now or in the background."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from runmgr.disk import atomic, checkpoints
from runmgr.errors import InvalidInput, RunError, Superseded
from runmgr.worker import staging, writing
from runmgr.worker import state as states

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Collection, Mapping

    from runmgr.disk.shelf import Shelf
    from runmgr.worker.averaging import Average
    from runmgr.worker.best import BestAverage, Held

SaveErrorPolicy = Literal["raise", "warn"]
_FAILURES_UNTIL_RAISE = 3
_PROGRESS_EVERY_S = 10.0
_OVERHEAD_BYTES = 64 << 10
_HEAD_START_S = 0.005


class SaveHandle:
    """What `Run.save` returns. Only rank 0's knows anything: the other ranks' `checkpoint` stays None."""

    def __init__(self) -> None:
        self.checkpoint: checkpoints.Checkpoint | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether the write has ended, well or not."""
        return self._thread is None or self._ended.is_set()

    def _start(self, write: Callable[[], None]) -> None:
        """Let a thread do the writing; RuntimeError where there can be no more threads."""
        thread = threading.Thread(target=lambda: self._run(write), name="runmgr-save")
        thread.start()
        self._thread = thread

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Return when this rank's write has ended: rank 0's, since the others have none. `Run.wait` is for all ranks.

        `checkpoint` is then the committed one; None if the save failed, which all ranks hear at the next `save`,
        `should_stop` or `wait` of the run.
        """
        if self._thread is not None:
            self._ended.wait()  # a join that Ctrl-C interrupts takes the thread for ended, up to Python 3.12
            self._thread.join()


class _InFlight:
    """One save being written: by the caller, or by a thread."""

    def __init__(self, save: _Prepared, handle: SaveHandle) -> None:
        self.save = save
        self.handle = handle
        self.error: Exception | None = None
        self.trained_s: float | None = None  # since the save before, or the restore


@dataclasses.dataclass
class _Prepared:
    content: dict[str, Any]
    checkpoint: checkpoints.Checkpoint
    shared: list[tuple[BestAverage, int, str]] = dataclasses.field(default_factory=list)


class Saver:
    """Writes this run's checkpoints, one at a time. Rank 0 only; every method is called from the main thread."""

    def __init__(self, shelf: Shelf, run_id: str, logger: logging.Logger, on_error: SaveErrorPolicy) -> None:
        self._shelf = shelf
        self._run_id = run_id
        self._logger = logger
        self._on_error = on_error
        self._failures = 0
        self._staging = staging.Staging()
        self._in_flight: _InFlight | None = None
        self._has_staged = False
        self.longest_save_s = 0.0
        self._trained_since = time.monotonic()
        self._warned: set[str] = set()
        self._averages: weakref.WeakSet[BestAverage] = weakref.WeakSet()

    def follow(self, average: BestAverage) -> None:
        """Keep the checkpoints that its members lie in for as long as it lives, also through saves without it."""
        self._averages.add(average)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Make the memory ready that a first `save(block=False)` of `state` will need; given back if it does block."""
        size_bytes, gpu = states.expected_size(state)
        self._check_keep(size_bytes)
        self._staging.reserve(size_bytes, pinned_for=gpu)
        self._trained_since = time.monotonic()

    def save(
        self,
        gathered: dict[str, Any],
        averages: Mapping[str, Held],
        *,
        facts: dict[str, Any],
        rng: list[dict[str, str]],
        logged: int,
        block: bool,
        private: Collection[int] = (),
    ) -> SaveHandle:
        """Write a gathered state: serialise once, commit, name. Raises what `on_error` does not tolerate.

        The averages' new members share the bytes of what is saved. `private` memory, see `Staging.copy`, is not copied.
        """
        self.collect()
        handle = SaveHandle()
        try:
            in_flight = _InFlight(self._prepared(gathered, averages, facts, rng), handle)
            in_flight.save.checkpoint = dataclasses.replace(in_flight.save.checkpoint, logged=logged)
            in_flight.trained_s = time.monotonic() - self._trained_since
            copied = None if block else self._staged(in_flight.save.content, private)
            if copied is None:
                if not self._has_staged:
                    self._staging.release()
                self._write(in_flight)
        except (OSError, RuntimeError, MemoryError) as error:
            self._failed(error)
            return handle
        self._in_flight, self._trained_since = in_flight, time.monotonic()
        if copied is None:
            self.collect()
            return handle
        in_flight.save.content = copied
        try:
            handle._start(lambda: self._write_behind(in_flight))  # noqa: SLF001  # made for each other
        except RuntimeError as error:  # ulimit -u, or the control group's pids.max
            self._warn_once(f"{error}, so save(block=False) waits for the write")
            self._write_behind(in_flight)
            self.collect()
        return handle

    def collect(self) -> None:
        """Wait for the save in flight, if any, and raise its error unless that is tolerated."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return
        try:
            in_flight.handle.wait()
        except BaseException:  # Ctrl-C while waiting: it is still being written
            self._in_flight = in_flight
            raise
        if in_flight.error is not None:
            self._failed(in_flight.error)
            return
        self._failures = 0
        entry = in_flight.save.checkpoint
        for average, number, key in in_flight.save.shared:
            average.lies_in(number, entry.object_name, key, entry.path_in(self._shelf.run))

    def has_failed(self) -> bool:
        """Whether the save in flight has failed, which the next `collect` tells."""
        return self._in_flight is not None and self._in_flight.error is not None

    def poll(self) -> None:
        """Do what `collect` does, unless the save in flight is not done yet."""
        if self._in_flight is not None and self._in_flight.handle.is_done:
            self.collect()

    def close(self) -> None:
        """End the save in flight and give the memory back; raises its error."""
        self._on_error = "raise"
        try:
            self.collect()
        finally:
            self._staging.release()

    def save_average(self, average: Average, weights: Mapping[str, Any]) -> checkpoints.Checkpoint:
        """Write `average_model.pth`: {"net": …, "members": …}."""
        self.collect()
        content = {
            "net": weights,
            "members": average.describe(),
            "average": type(average).__name__,
            "run_id": self._run_id,
        }
        self._check_space(content)
        in_flight = _InFlight(_Prepared(content, self._shelf.next(kind="average")), SaveHandle())
        try:
            self._write(in_flight)
        except OSError as error:
            self._check_newest(error)
            raise
        return in_flight.save.checkpoint

    def _prepared(
        self,
        gathered: dict[str, Any],
        averages: Mapping[str, Held],
        facts: dict[str, Any],
        rng: list[dict[str, str]],
    ) -> _Prepared:
        self._check_monitor(facts["metrics"])
        for held in averages.values():
            self.follow(held.average)
        self._shelf.held = frozenset(
            member.object_name for average in self._averages for member in average.members if member.object_name
        )
        checkpoint = self._shelf.next(**facts)
        members: list[str] = []
        shared = []
        for key, held in averages.items():
            gathered[key] = held.average.content(held, checkpoint.object_name)
            members += [entry["object"] for entry in gathered[key]["members"] if entry["object"]]
            shared += [(held.average, number, key) for number in held.weights]
            if held.shared is not None:
                shared.append((held.average, held.shared, held.source_key))
        content = gathered | facts | {"run_id": self._run_id, "rng": rng}
        self._check_space(content)
        checkpoint = dataclasses.replace(checkpoint, members=tuple(dict.fromkeys(members)))
        return _Prepared(content, checkpoint, shared)

    def _check_space(self, content: Mapping[str, Any]) -> None:
        """Raise before anything is copied or written when the file cannot fit."""
        directory = self._shelf.run.objects_path
        needed, free = staging.size_bytes_of(content) + _OVERHEAD_BYTES, atomic.free_bytes(directory)
        if needed > free:
            shown = f"the checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {shown}", str(directory))

    def _staged(self, content: dict[str, Any], private: Collection[int]) -> dict[str, Any] | None:
        """Copy the content, or say once why it has to be written while training waits."""
        can_stage = staging.can_stage(content)
        copied = self._staging.copy(staging.ordinary(content), private) if can_stage else None
        if copied is None:
            why = "memory is short for a second copy of the state" if can_stage else "the state holds sparse tensors"
            self._warn_once(f"{why}, so save(block=False) waits for the write")
            return None
        self._has_staged = True
        return cast("dict[str, Any]", copied)

    def _write_behind(self, in_flight: _InFlight) -> None:
        time.sleep(_HEAD_START_S)  # let save() return first: the pickling ahead needs the interpreter lock as well
        try:
            self._write(in_flight)
        except Exception as error:  # noqa: BLE001  # the main thread raises it at the next collect()
            in_flight.error = error
        finally:
            in_flight.save.content = {}

    def _write(self, in_flight: _InFlight) -> None:
        start = time.perf_counter()
        checkpoint = in_flight.save.checkpoint
        writing.write_file(
            in_flight.save.content, checkpoint.path_in(self._shelf.run), self._progress(in_flight.save.content)
        )
        published = self._shelf.publish(checkpoint)
        in_flight.save.checkpoint = in_flight.handle.checkpoint = published
        seconds = time.perf_counter() - start
        self.longest_save_s = max(self.longest_save_s, seconds)
        self._logger.info(
            "saved %s: %s%.1f MB in %.2f s, %.2f GB/s",
            ", ".join(published.names), _progress_told(published, in_flight.trained_s), published.size_bytes / 1e6,
            seconds, published.size_bytes / 1e9 / seconds,
        )  # fmt: skip
        self._check_keep(published.size_bytes)

    def _progress(self, content: Mapping[str, Any]) -> Callable[[int], None]:
        """Return what tells the log, every ten seconds, how far a long save is."""
        total, start = staging.size_bytes_of(content), time.monotonic()
        told = start

        def advance(done: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= _PROGRESS_EVERY_S:
                told = now
                self._logger.info(
                    "saving: %.2f of %.2f GB after %.0f s, %.2f GB/s",
                    done / 1e9,
                    total / 1e9,
                    now - start,
                    done / 1e9 / (now - start),
                )

        return advance

    def _failed(self, error: Exception) -> None:
        """Raise, or tell the log and the run's record and go on with the previous checkpoint."""
        if isinstance(
            error, RunError
        ):  # a newer attempt writes here now, or the input was wrong: nothing to go on with
            raise error
        self._check_newest(error)
        self._failures += 1
        told = {"error": f"{type(error).__name__}: {error}", "in_a_row": self._failures}
        try:
            self._shelf.run_record.update(save_error=told)
        except OSError as trouble:  # the same full disk, most likely
            self._logger.warning("the failed save could not be recorded either: %s", trouble)
        if self._on_error == "raise" or self._failures >= _FAILURES_UNTIL_RAISE:
            raise error
        self._logger.warning("a save failed: %s; training goes on with the previous checkpoint", told["error"])

    def _check_newest(self, error: Exception) -> None:
        """Raise Superseded if that is why a call failed: a newer attempt sweeps away what this one was writing."""
        try:
            self._shelf.attempt.check_newest()
        except Superseded as superseded:
            raise superseded from error
        except OSError:  # then the disk is the trouble, and `error` says so
            pass

    def _check_keep(self, size_bytes: int) -> None:
        """Warn when the files that `keep` will collect cannot all lie on this disk."""
        keep = self._shelf.keep
        wanted = max(keep.last or 1, 1) + keep.best + len(keep.epochs) + 1
        more, free = wanted - len(self._shelf.entries), atomic.free_bytes(self._shelf.run.objects_path)
        if more * size_bytes > free:
            self._warn_once(
                f"{keep} collects {more} or more files of {size_bytes / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are "
                f"free: make room or keep fewer"
            )

    def _check_monitor(self, metrics: dict[str, float]) -> None:
        monitor = self._shelf.monitor
        if metrics and monitor is not None and monitor not in metrics:
            self._warn_once(
                f"save() got the metrics {sorted(metrics)} but not {monitor!r}, which start_run(monitor=…) watches: such a "
                f"save never becomes best"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._logger.warning("%s", text)


def check_counts(epoch: int | None, step: int | None) -> None:
    """Raise InvalidInput unless at least one is given, and both are whole numbers."""
    for name, value in (("epoch", epoch), ("step", step)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InvalidInput(f"{name}={value!r} must be a whole number of finished {name}s, at least 0")
    if epoch is None and step is None:
        raise InvalidInput("save() needs epoch= or step= (or both), so that the checkpoint can be told from others")


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics as floats; one-element tensors and numpy scalars are fine."""
    found = {}
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"metrics[{name!r}]={value!r} is not one number: {error}") from None
    return found


def _progress_told(checkpoint: checkpoints.Checkpoint, trained_s: float | None) -> str:
    """Return the part of a log line that is about the training: how far, how good, how long it took."""
    counts = {"epoch": checkpoint.epoch, "step": checkpoint.step}
    parts = [f"{name} {count}" for name, count in counts.items() if count is not None]
    parts += [f"{name} {value:.6g}" for name, value in checkpoint.metrics.items()]
    parts += [] if trained_s is None else [f"{trained_s:.1f} s of training"]
    return "".join([", ".join(parts), "; "] if parts else [])
