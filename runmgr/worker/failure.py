"""A rank's last words: its traceback, last log lines and device memory, and whether another rank was the cause.

Any rank, by itself: no collective, no device synchronisation, no import. It never hides the training's own error.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch

from runmgr.disk import failures, record
from runmgr.errors import AgreementError, RankFailed, RankTimeout, RunError, Superseded
from runmgr.worker.siblings import Siblings

if TYPE_CHECKING:
    import logging
    from collections import deque

    from runmgr.disk.directory import RunDirectory
    from runmgr.ranks import Ranks

_PATIENCE_S = 1.0
_PAUSE_S = 0.02
_TRACE_LINES = 400
_DIST_ERRORS = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"}
_FOLLOWS = re.compile(
    r"gloo/transport|remote process exited|[Cc]onnection (?:closed|reset|was closed) by (?:remote )?peer|"
    r"Application timeout caused pair closure|DataLoader worker .* is killed by signal: Terminated"
)
_SIGTERM_EXIT = 128 + 15
_MEMORY = {
    "allocated_bytes": "allocated_bytes.all.current",
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "reserved_bytes": "reserved_bytes.all.current",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
    "allocation_retries": "num_alloc_retries",
    "out_of_memory_errors": "num_ooms",
}


class Witness:
    """What one rank can say of failures, its own and its neighbours', while a run is open."""

    def __init__(self, run: RunDirectory, attempt: int, ranks: Ranks, tail: deque[str], logger: logging.Logger) -> None:
        self._run, self._attempt, self._ranks, self._tail, self._logger = run, attempt, ranks, tail, logger
        self._siblings = Siblings(run, attempt, ranks)
        self._is_consequence = False

    def testify(self, error: BaseException | None, received: str | None) -> None:
        """Leave the report of this rank's own error, if it is one; `received` names the signal that came before."""
        if error is None or isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            return
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return
        try:
            failures.leave(self._run, self._report(error, received))
        except Exception as trouble:  # noqa: BLE001  # whatever it is, it must not hide the training's own error
            self._logger.error("the failure of rank %d could not be reported: %s", self._ranks.rank, trouble)  # noqa: TRY400

    def first_failure(self, attempt: dict[str, Any]) -> dict[str, Any]:
        """Return run.json's `first_failure` for an attempt that failed, as far as it can be seen now. Rank 0 only."""
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while self._is_consequence and not failures.has_cause(self._run, self._attempt):
                if time.monotonic() > deadline:  # the rank that failed first may just be writing
                    break
                time.sleep(_PAUSE_S)
            found = failures.first(self._run, attempt)
        except OSError as trouble:
            self._logger.error("the reports in %s cannot be read: %s", self._run.failures_path, trouble)  # noqa: TRY400
            return {}
        if found is None:
            return {}
        self._logger.error("first failure: %s (%s)", failures.sentence(found), self._run.path / found["report"])
        return {"first_failure": found}

    def close(self) -> None:
        """Stop looking."""
        self._siblings.close()

    def _report(self, error: BaseException, received: str | None) -> dict[str, Any]:
        why = reason(error, self._ranks.rank, received)
        self._is_consequence = why is not None
        shown = origin(error)
        return {
            "format": record.FORMAT, "attempt": self._attempt, "rank": self._ranks.rank,
            "local_rank": self._ranks.local_rank, "host": self._ranks.host, "pid": os.getpid(),
            "time": record.now_text(), "is_consequence": self._is_consequence, "reason": why,
            "blames": blamed(error), "error": {"type": type(shown).__name__, "message": record.text_of(shown)},
            "traceback": _trace(error), "log": list(self._tail), "device_memory": _device_memory(),
            "gone": {str(rank): how for rank, how in sorted(self._siblings.gone.items())},
        }  # fmt: skip


def reason(error: BaseException, rank: int, received: str | None = None) -> str | None:
    """Why `error` on `rank` is only a consequence of another rank's end, or None when it is a cause of its own."""
    if received == "SIGTERM":
        return "it came after SIGTERM"
    chain = [*_chain(error)]
    if any(isinstance(link, RunError) and not _is_foreign(link, rank) for link in chain):
        return None
    root = chain[-1]
    if isinstance(root, SystemExit) and root.code == _SIGTERM_EXIT:
        return "SIGTERM ended it"
    if isinstance(root, RunError):
        return "another rank failed, or did not come"
    is_of_dist = bool(_DIST_ERRORS & {kind.__name__ for kind in type(root).__mro__})
    if is_of_dist or (isinstance(root, RuntimeError) and _FOLLOWS.search(record.text_of(root))):
        return "the connection to another rank was lost"
    return None


def origin(error: BaseException) -> BaseException:
    """Return the error that came first, where another was raised while cleaning up after it."""
    while error.__cause__ is None and (before := _before(error)) is not None:
        error = before
    return error


def blamed(error: BaseException) -> list[int]:
    """Return the ranks that the error itself names."""
    for link in _chain(error):
        if isinstance(link, RankFailed):
            return [link.rank]
        if isinstance(link, RankTimeout):
            return list(link.ranks)
    return []


def _is_foreign(error: RunError, rank: int) -> bool:
    if isinstance(error, RankFailed):
        return error.rank != rank
    if isinstance(error, RankTimeout):
        return rank not in error.ranks
    return error.is_echo or isinstance(error, (AgreementError, Superseded))


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error and what it came from, the root last."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not any(link is known for known in found):
        found.append(link)
        link = _before(link)
    return found


def _before(error: BaseException) -> BaseException | None:
    if error.__cause__ is not None:
        return error.__cause__
    before = None if error.__suppress_context__ else error.__context__
    return None if isinstance(before, (StopIteration, StopAsyncIteration)) else before  # a loop's end is no failure


def _trace(error: BaseException) -> list[str]:
    """Return the traceback as the interpreter prints it, without anybody's variables."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) > _TRACE_LINES:
        half = _TRACE_LINES // 2
        lines = [*lines[:half], f"  … {len(lines) - 2 * half} lines …", *lines[-half:]]
    return lines


def _device_memory() -> dict[str, Any] | None:
    """Return what torch's allocator knows of this rank's device; None without a CUDA context, and makes none."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    try:
        found = torch.cuda.memory_stats()
        return {"device": torch.cuda.current_device()} | {name: found.get(key) for name, key in _MEMORY.items()}
    except RuntimeError:  # the context may be what broke
        return None
