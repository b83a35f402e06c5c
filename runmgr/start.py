"""start_run: one launch, one run, opened on all ranks or on none."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr import opening
from runmgr.disk import claiming, drift, failures, launches, provenance
from runmgr.disk import directory as directories
from runmgr.disk import shelf as shelves
from runmgr.disk.directory import Experiment, RunDirectory
from runmgr.errors import InvalidInput, RunError
from runmgr.opening import Request
from runmgr.run import Run, Writer
from runmgr.worker import agreement as agreements

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runmgr.disk.checkpoints import Mode
    from runmgr.disk.shelf import Keep
    from runmgr.opening import Resume
    from runmgr.worker.agreement import Agreement
    from runmgr.worker.saving import SaveErrorPolicy

_RESUMES = ("auto", "latest", "never")

_open_run: Run | None = None


def start_run(
    experiment_name: str,
    *,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    config: Any = None,
    resume: Resume = "auto",
    run_id: str | None = None,
    fork_from: str | os.PathLike[str] | None = None,
    monitor: str | None = None,
    mode: Mode = "max",
    keep: Keep | None = None,
    on_save_error: SaveErrorPolicy = "raise",
    tags: Iterable[str] = (),
    capture_console: bool = False,
    system_metrics_every_s: float | None = 30.0,
    timeout_s: float = 300.0,
) -> Run:
    """Open this launch's run: one directory `<ckpt_root_dir>/<experiment_name>/<run_id>/` for all its ranks.

    Every rank, before or after `init_process_group`; creates no CUDA context. If anything fails on any rank, every
    rank raises the same error, and nothing is left behind: InvalidInput, RunNotFound (run_id, fork_from), RunBusy, NotShared,
    RankTimeout, RankFailed or OSError. One run is open in a process at a time.

    ckpt_root_dir  where experiments lie; default $RUNMGR_CKPT_ROOT_DIR, else `checkpoints/` in the script's project
    config         Mapping, Namespace, dataclass or OmegaConf; goes to config.json with secrets masked
    resume         "auto": a restart of this launch continues its run, otherwise a new one; "latest": the newest run
                   that has a checkpoint (RunBusy if it is being trained), a new one if there is none; "never": new
    run_id         continue exactly this run
    fork_from      start a new run from a checkpoint: a run id of this experiment, or the path of a file
    monitor        the metric, of those given to `save(metrics=…)`, by which a checkpoint is best; None: none is
    mode           "max" where more of it is better, "min" where less is
    keep           which checkpoints stay, a `Keep`; by default the latest and the best
    on_save_error  "raise", or "warn" to train on with the previous checkpoint, up to three failures in a row
    tags           words to find the run by
    capture_console  write what each rank prints into console_<time>.txt as well, C++, NCCL and child processes included
    system_metrics_every_s  how often each host's load goes to TensorBoard, where psutil is installed; None: never
    timeout_s      how long ranks wait for each other before the one that does not come is named
    """
    if _open_run is not None:
        raise RunError(f"run {_open_run.run_id} is still open in this process; finish() it before starting another")
    if not _is_duration(timeout_s):
        raise InvalidInput(f"timeout_s={timeout_s!r} must be a number of seconds above 0")
    agreement = agreements.connect(float(timeout_s))
    requests: list[Request] = []
    writers: list[Writer] = []

    def contribute() -> dict[str, Any]:
        request = _check(
            experiment_name, ckpt_root_dir, config, resume, run_id, fork_from, monitor, mode, keep, on_save_error, tags
        )  # fmt: skip
        _check_period(system_metrics_every_s)
        requests.append(request)
        return _place(agreement)

    def decide(places: list[dict[str, Any]]) -> dict[str, Any]:
        answer, writer = opening.open_run(requests[0], places, timeout_s)
        writers.append(writer)
        return answer

    try:
        shown = ckpt_root_dir or directories.default_root()
        answer = agreement.agree(f"create a run of {experiment_name!r} in {shown}", decide, contribute)
        run = RunDirectory(Path(answer["run_dir"]))
        _confirm(agreement, run, answer)
        if agreement.ranks.local_rank == 0:
            launches.remember_by_agent(answer["launch"])
        return _opened(
            agreement,
            run,
            answer,
            requests[0],
            writers,
            on_save_error=on_save_error,
            capture_console=capture_console,
            system_metrics_every_s=system_metrics_every_s,
        )
    except BaseException:
        for writer in writers:
            opening.take_back(writer)
        agreements.forget(agreement)
        raise


def _place(agreement: Agreement) -> dict[str, Any]:
    """Say where this rank is, and once for each host what is there."""
    ranks = agreement.ranks
    return {
        "host": ranks.host,
        "rank": ranks.rank,
        "devices": provenance.devices() if ranks.local_rank == 0 else [],
        "pid": os.getpid(),
        "pid_space": provenance.pid_space(),
        "launch": launches.remembered_by_agent() if ranks.local_rank == 0 else None,
    }


def _opened(
    agreement: Agreement,
    run: RunDirectory,
    answer: dict[str, Any],
    request: Request,
    writers: list[Writer],
    *,
    on_save_error: SaveErrorPolicy,
    capture_console: bool,
    system_metrics_every_s: float | None,
) -> Run:
    global _open_run  # noqa: PLW0603  # one open run a process
    opened = Run(
        run,
        agreement,
        writers[0] if writers else None,
        attempt=answer["attempt"],
        resumed=answer["resumed"],
        config=request.config,
        started=answer["started"],
        on_save_error=on_save_error,
        capture_console=capture_console,
        system_metrics_every_s=system_metrics_every_s,
        one_of_each_host=answer["confirming"],
        on_closed=_forget_open_run,
    )
    opened._must_restore = answer["has_checkpoints"]  # noqa: SLF001  # the two files are one part
    _open_run = opened
    if opened.is_main:
        opened.logger.info(
            "%s %s, attempt %d: %d ranks on %s", "resumed" if opened.resumed else "created", run.path, opened.attempt,
            opened.world_size, ", ".join(answer["hosts"]),
        )  # fmt: skip
        if request.config:
            masked, _ = provenance.masked(request.config)
            opened.logger.info("configuration %s", json.dumps(masked, ensure_ascii=False))
        _tell_of_the_past(opened, writers[0])
        if answer["without_lock"]:
            opened.logger.warning(
                "%s; the run id was claimed by mkdir alone, which is as safe but keeps no order among launches of the "
                "same moment",
                answer["without_lock"],
            )
    return opened


def _tell_of_the_past(opened: Run, writer: Writer) -> None:
    """Log which rank failed first in the attempt before, and what differs from it."""
    past = writer.record.content.get("first_failure") or {}
    before = writer.attempt.number - 1
    if past.get("attempt") == before > 0:
        opened.logger.warning("first failure of attempt %d: %s", before, failures.sentence(past))
    if differences := writer.attempt.content.get("drift"):
        opened.logger.warning("this attempt differs from attempt %d: %s", before, drift.sentence(differences))


def _forget_open_run() -> None:
    global _open_run  # noqa: PLW0603  # as above
    _open_run = None


def _check(  # noqa: PLR0917  # the arguments of start_run, in its order
    experiment_name: str,
    ckpt_root_dir: str | os.PathLike[str] | None,
    config: Any,
    resume: Resume,
    run_id: str | None,
    fork_from: str | os.PathLike[str] | None,
    monitor: str | None,
    mode: Mode,
    keep: Keep | None,
    on_save_error: SaveErrorPolicy,
    tags: Iterable[str],
) -> Request:
    directories.check_name(experiment_name, "experiment name")
    for name, value, allowed in (
        ("resume", resume, _RESUMES), ("mode", mode, ("max", "min")), ("on_save_error", on_save_error, ("raise", "warn")),
    ):  # fmt: skip
        if value not in allowed:
            raise InvalidInput(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
    if run_id is not None:
        directories.check_name(run_id, "run id")
        if resume != "auto":
            raise InvalidInput(
                f"run_id={run_id!r} names the run to continue, so resume={resume!r} has no meaning; leave it out"
            )
    if fork_from is not None and (run_id is not None or resume == "latest"):
        other = f"run_id={run_id!r}" if run_id is not None else "resume='latest'"
        raise InvalidInput(f"fork_from starts a new run, {other} continues one; give one of them")
    if isinstance(tags, str):
        raise InvalidInput(f"tags={tags!r} must be a list of words, such as [{tags!r}]")
    if keep is not None and not isinstance(keep, shelves.Keep):
        raise InvalidInput(f"keep={keep!r} must be a runmgr.Keep, such as Keep(last=3, every_n_epochs=10)")
    plain = provenance.plain_config(config)
    return Request(
        Experiment(directories.resolve_root(ckpt_root_dir), experiment_name),
        plain,
        provenance.masked(plain)[1],
        resume,
        run_id,
        None if fork_from is None else os.fspath(fork_from),
        monitor,
        mode,
        keep or shelves.Keep(),
        tuple(directories.check_name(tag, "tag") for tag in tags),
    )


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_period(system_metrics_every_s: float | None) -> None:
    if system_metrics_every_s is not None and not _is_duration(system_metrics_every_s):
        raise InvalidInput(
            f"system_metrics_every_s={system_metrics_every_s!r} must be a number of seconds above 0, or None to measure nothing"
        )


def _confirm(agreement: Agreement, run: RunDirectory, answer: dict[str, Any]) -> None:
    """Let one rank of each host check that it sees the directory which rank 0 made."""

    def look() -> None:
        if agreement.ranks.rank in answer["confirming"]:
            limit_s = min(60.0, agreement.timeout_s)
            claiming.confirm_shared(run, answer["token"], host=agreement.ranks.host, timeout_s=limit_s)

    agreement.agree(f"see the run directory {run.path}", lambda _: None, look)
