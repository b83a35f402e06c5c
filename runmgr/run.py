"""Run: the one place where the parts meet. `start_run` in `start.py` makes it."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from runmgr.disk import integrity, record
from runmgr.errors import CheckpointNotFound, InvalidInput, RunError
from runmgr.worker import agreement as agreements
from runmgr.worker import console, failure, gathering, introduction, loading, logs, meeting, preemption, saving, system
from runmgr.worker import state as states
from runmgr.worker.best import BestAverage, check_modes

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from runmgr.disk.directory import RunDirectory
    from runmgr.disk.launches import Launch
    from runmgr.disk.lease import Lease
    from runmgr.disk.record import Attempt, RunRecord
    from runmgr.disk.shelf import Shelf
    from runmgr.worker.agreement import Agreement
    from runmgr.worker.averaging import Average
    from runmgr.worker.loading import Progress
    from runmgr.worker.saving import SaveErrorPolicy


class Writer(NamedTuple):
    """What only rank 0 holds of an open run."""

    shelf: Shelf
    attempt: Attempt
    record: RunRecord
    lease: Lease
    is_new: bool
    launches: list[Launch]


class Run:
    """An open run. Made by `start_run`, left through `with` or `finish()`.

    Its status is then completed; preempted, after `should_stop` said True; interrupted, by Ctrl-C; or failed, by another
    exception. The attributes are plain and never collective. Methods say who must call them.

    run_id, experiment_name     which run this is
    run_dir                     its directory, a Path
    rank, world_size, is_main   this process among those of the launch; rank 0 is main
    attempt                     how many starts of processes the run has had, this one included
    resumed                     whether the run was there before this start
    config                      the configuration that was given, as plain dicts, lists and values, secrets included
    logger                      writes to this rank's log file, rank 0's to the terminal as well
    log_handler                 that file, for loggers of your own: `logging.getLogger().addHandler(run.log_handler)`
    tensorboard                 rank 0's SummaryWriter; on other ranks all its methods do nothing
    """

    def __init__(
        self,
        directory: RunDirectory,
        agreement: Agreement,
        writer: Writer | None,
        *,
        attempt: int,
        resumed: bool,
        config: dict[str, Any],
        started: str,
        on_save_error: SaveErrorPolicy,
        capture_console: bool,
        system_metrics_every_s: float | None,
        one_of_each_host: Sequence[int],
        on_closed: Callable[[], None],
    ) -> None:
        self.run_id = directory.run_id
        self.run_dir = directory.path
        self.experiment_name = directory.path.parent.name
        self.rank = agreement.ranks.rank
        self.world_size = agreement.ranks.world_size
        self.is_main = agreement.ranks.is_main
        self.attempt = attempt
        self.resumed = resumed
        self.config = config
        self._directory = directory
        self._agreement = agreement
        self._writer = writer
        self._on_closed = on_closed
        self._logs = logs.Logs(directory.log_path(started, self.rank), on_console=self.is_main)
        self.logger: logging.Logger = self._logs.logger
        self.log_handler: logging.Handler = self._logs.handler
        self.tensorboard = logs.NoTensorBoard() if writer is None else _tensorboard(directory, writer, config)
        self._saver = saving.Saver(writer.shelf, self.run_id, self.logger, on_save_error) if writer else None
        self._preemption = preemption.Preemption()
        self._witness = failure.Witness(directory, attempt, agreement.ranks, self._logs.tail, self.logger)
        self._meeting: meeting.Meeting | None = None
        self._must_restore = False
        self._was_stopped = False
        self._late_error: Exception | None = None
        self._pid = os.getpid()
        self._is_open = True
        self._step = 0  # the last one that was told of
        self._system = system.SystemMetrics(
            agreement, one_of_each_host, directory.path, self._log_system, self.logger, every_s=system_metrics_every_s
        )
        console_path = directory.console_path(started, self.rank) if capture_console else None
        self._console = console.capture(console_path, self.logger)
        atexit.register(self._finish_at_exit)

    def __repr__(self) -> str:
        return f"<Run {self.run_id} of {self.experiment_name!r}, attempt {self.attempt}, rank {self.rank}/{self.world_size}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run with the status that fits; no rank waits for another here."""
        try:
            self._finish(self._status_after(kind), error)
        finally:
            self._console.add_traceback(error)

    def path(self, name: str) -> Path:
        """Return a file's place in the run directory; "latest", "best" and "average" stand for their checkpoints."""
        return self._directory.public_path(name)

    def log_scalars(self, scalars: Mapping[str, Any], *, step: int) -> None:
        """Write scalars to TensorBoard at `step`: numbers, or tensors of one element, by their names.

        Any rank may call; only rank 0's values are written.
        """
        self._step = step
        if self.is_main:
            for name, value in saving.plain_metrics(scalars).items():
                self.tensorboard.add_scalar(name, value, step)

    def _log_system(self, values: Mapping[str, float]) -> None:
        """Write what machines did. At the training's step, so that a restore hides what is done again; any thread."""
        self.tensorboard.add_now({f"system/{name}": value for name, value in values.items()}, self._step)

    def save(
        self,
        state: Mapping[str, Any],
        *,
        epoch: int | None = None,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        block: bool = True,
    ) -> saving.SaveHandle:
        """Save `state`, as latest, and as best when the monitored metric in `metrics` is the best.

        Every rank. `epoch` counts finished epochs, `step` finished steps; give one or both. The file holds the keys
        of `state` (modules bare, with full state dicts) and epoch, step, metrics, run_id and the random-number states
        of all ranks. If it fails on any rank, say by OSError on a full disk, it raises the same error on all, and the
        previous checkpoint is intact.
        `state_dict()` is called on every rank; rank 0's is saved. What `torch.load(weights_only=True)` would not load is
        an error naming its place; named tuples become tuples, dataclasses dicts, enums and paths what they stand for.

        Blocking, it is durable on return. With `block=False` it returns once the state is copied; the write goes on in
        the background, the next save waits for it, and an error is raised on all ranks by the next `save`,
        `should_stop` or `wait`. One more copy of the state is then held in memory on rank 0 (`restore` makes it ready).
        """
        self._check_open()
        handles: list[saving.SaveHandle] = []

        def take() -> gathering.Gathering:
            self._check_save(state, epoch, step)
            saving.plain_metrics(metrics)
            if self._saver is not None:
                self._saver.collect()
            self._step = self._step if step is None else step
            return gathering.Gathering(state)

        def write(found: gathering.Gathering) -> None:
            assert self._saver is not None
            self.tensorboard.flush()
            handle = self._saver.save(
                found.content,
                found.held,
                facts={"epoch": epoch, "step": step, "metrics": saving.plain_metrics(metrics)},
                rng=found.rng,
                logged=self.tensorboard.last_step,
                block=block,
                private=found.private,
            )
            handles.append(handle)

        gathering.gather(self._agreement, f"save a checkpoint in {self.run_dir}", take, write)
        return handles[0] if handles else saving.SaveHandle()

    def restore(self, state: Mapping[str, Any], name: str = "latest") -> Progress:
        """Load a checkpoint into the objects of `state` and continue the random numbers; say how far it had come.

        Every rank. Rank 0 chooses for all: "latest" falls back to the next older good checkpoint, with a warning; any
        other name ("best", "ckpt_epoch_10.pth") is loaded exactly, or is CheckpointNotFound or CheckpointCorrupt. In a
        fresh run nothing happens. A key of `state` that the checkpoint lacks is an error, further keys in the file are
        ignored.
        """
        self._check_open()
        self.wait()
        shelf = None if self._writer is None else self._writer.shelf
        chosen = loading.choose(self._agreement, self._directory, shelf, name, self.logger)
        if chosen is None:
            if self.resumed:
                self.tensorboard.resume_after(-1)
            self._must_restore = False
            self._prepare_saves(state)
            return loading.progress({}, None)
        path, renamed = chosen.path, chosen.renamed
        loaded: dict[str, Any] = {}

        def load() -> None:
            loaded.update(chosen.content)
            values = states.restore(state, loaded, self.rank)
            for average in state.values():
                if isinstance(average, BestAverage):
                    average.locate(lambda member: path.parent / renamed.get(member, member))
                    if self._saver is not None:
                        self._saver.follow(average)
            loaded["values"] = values
            states.restore_rng(loaded.get("rng", []), self.rank, self.logger)

        self._agreement.agree(f"load {path}", lambda _: shelf.continue_from(path) if shelf else None, load)
        self._must_restore = False
        self._step = loaded.get("step") or 0
        self._prepare_saves(state)
        progress = loading.progress(loaded, path)
        if shelf is not None:
            logged = shelf.logged_by(path)
            if (last := loaded.get("step") if logged is None else logged) is not None:
                self.tensorboard.resume_after(last)
            self.logger.info("restored %s: epoch %d, step %d", chosen.shown, progress.epoch, progress.step)
        return progress

    def load(self, name_or_path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
        """Load one file, once every byte is checked, and return what it holds. Any rank.

        A name ("best", "ckpt_epoch_10.pth") means this run's file; "cuda" means this rank's device. Raises
        CheckpointNotFound, or CheckpointCorrupt for what is damaged or needs more than `weights_only=True`.
        """
        is_name = isinstance(name_or_path, str) and "/" not in name_or_path
        path = self.path(str(name_or_path)) if is_name else Path(name_or_path)
        if not path.exists():
            raise CheckpointNotFound(f"there is no {path}", path=str(path))
        if map_location == "cuda":
            map_location = f"cuda:{self._agreement.ranks.local_rank}"
        if loading.can_map(path):
            integrity.check_content(path)
        return loading.load_file(path, map_location=map_location)

    def save_average(self, average: Average) -> Path:
        """Write the average as `average_model.pth`: {"net": …, "members": …}, durable on return. Every rank."""
        self._check_open()
        weights = average.whole(keep=self.is_main)

        def decide(_: list[Any]) -> None:
            assert self._saver is not None
            self._saver.save_average(average, weights)

        self._agreement.agree(f"save the average in {self.run_dir}", decide)
        return self.path("average")

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop: SIGTERM, SIGUSR1, SIGUSR2, or the Slurm job's time ends in a minute.

        Every rank, equally often, from the main thread; all ranks answer True at the same call, within a second and
        two calls of the signal. Until then a call costs microseconds: nothing is exchanged, no device is waited for.
        The first one installs the signal handlers. Give a DataLoader with workers `worker_init_fn=ignore_stop_signals`.
        """
        self._check_open()
        if self._was_stopped:
            return True
        if self._meeting is None:
            self._preemption.watch()
            self._meeting = meeting.Meeting(self._agreement, self._wants_to_meet)
        if not self._meeting.is_due():
            return False

        def decide(reasons: list[str | None]) -> str | None:
            if self._saver is not None:
                self._saver.poll()
            return next(filter(None, reasons), None)

        try:
            reason = self._agreement.agree("ask whether to stop", decide, self._reason_to_stop)
        finally:
            self._meeting.has_met()
        if reason is not None:
            self._was_stopped = True
            if self.is_main:
                self.logger.warning("stopping: a rank received %s", reason)
        return self._was_stopped

    def wait(self) -> None:
        """Return when every save is durable; raises, on all ranks, the error of one that failed. Every rank."""
        self._check_open()

        def decide(_: list[Any]) -> None:
            assert self._saver is not None
            self._saver.collect()

        self._agreement.agree(f"end the saves in {self.run_dir}", decide)

    def finish(self) -> None:
        """End the run as completed (or preempted, after should_stop() said True). Any rank, not collective.

        Without it and without `with`, the exit of the interpreter ends the run, as failed after an uncaught error. A notebook
        or another interactive session that ends leaves it as interrupted.
        """
        self._finish(self._status_after(None), None)

    def _reason_to_stop(self) -> str | None:
        return self._preemption.reason(self._saver.longest_save_s if self._saver is not None else 0.0)

    def _wants_to_meet(self) -> bool:
        return self._reason_to_stop() is not None or (self._saver is not None and self._saver.has_failed())

    def _prepare_saves(self, state: Mapping[str, Any]) -> None:
        if self._saver is not None:
            self._saver.prepare(state)

    def _check_open(self) -> None:
        if not self._is_open:
            raise RunError(f"run {self.run_id} has ended; start_run(…, run_id={self.run_id!r}) opens it again")

    def _check_save(self, state: Mapping[str, Any], epoch: int | None, step: int | None) -> None:
        states.check_keys(state)
        saving.check_counts(epoch, step)
        if self._must_restore:
            raise InvalidInput(
                f"run {self.run_id} has checkpoints, and saving before run.restore(state) would hide them behind a "
                f"training that starts from nothing; call restore() first, or start_run(…, resume='never')"
            )
        if self._writer is not None and self._writer.shelf.monitor is not None:
            check_modes(state, self._writer.shelf.mode)

    def _status_after(self, kind: type[BaseException] | None) -> str:
        if kind is None:
            return "preempted" if self._was_stopped else "completed"
        return "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"

    def _finish_at_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        if hasattr(sys, "ps1"):  # interactive: its last error may be any cell's, and nobody has called finish()
            self._finish(self._status_after(KeyboardInterrupt), None)
        else:
            self._finish(self._status_after(getattr(sys, "last_type", None)), getattr(sys, "last_value", None))

    def _end_saves(self, error: BaseException | None) -> None:
        """Wait for the save in flight; its failure must not hide the training's own error."""
        assert self._saver is not None
        try:
            self._saver.close()
        except (OSError, RuntimeError, MemoryError, RunError) as trouble:
            self.logger.error("the last save failed: %s", trouble)  # noqa: TRY400
            if error is None:
                self._late_error = trouble

    def _finish(self, status: str, error: BaseException | None) -> None:
        """Write the status and give everything back; the run's own troubles never hide the training's error."""
        if not self._is_open:
            return
        self._is_open = False
        self._preemption.explain(error)
        self._witness.testify(error, self._preemption.received)  # first: whoever ends the others may kill this one soon
        atexit.unregister(self._finish_at_exit)
        self._preemption.close()
        if self._meeting is not None:
            self._meeting.close()
        self._system.close()
        agreements.forget(self._agreement)
        try:
            self.tensorboard.flush()
            if self._writer is not None:
                self._end_saves(error)
                if self._late_error is not None:
                    status, error = "failed", self._late_error
                    self._witness.testify(error, None)
                self.tensorboard.end(status)
                seen = self._witness.first_failure(self._writer.attempt.content) if status == "failed" else {}
                record.write_end(self._writer.attempt, self._writer.record, status, error, seen)
                self.logger.info("run %s: %s", self.run_id, status)
        except (OSError, RunError) as trouble:
            self.logger.error("the end of run %s could not be recorded: %s", self.run_id, trouble)  # noqa: TRY400
            if error is None:
                raise
        finally:
            if self._writer is not None:
                self._writer.lease.release()
            self._witness.close()
            self._logs.close()
            self._on_closed()
            self._console.close()
        if self._late_error is not None:
            raise self._late_error


def _tensorboard(directory: RunDirectory, writer: Writer, config: dict[str, Any]) -> logs.TensorBoard:
    """Return what begins its events file, once there is something to write, with what the run is."""
    facts = writer.record.content | writer.attempt.content
    return logs.TensorBoard(directory.path, lambda: introduction.summaries(config, facts), is_new=writer.is_new)
