"""Average checkpoints that lie on disk, of one run or a soup of several, into a file of its own."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, checkpoints, directory, integrity, lease, members, record
from runmgr.disk.directory import AVERAGE_NAME, CHECKPOINT_PREFIX, RunDirectory
from runmgr.disk.tensors import TensorFile
from runmgr.errors import CheckpointNotFound, InvalidInput, RunBusy
from runmgr.worker import blending, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runmgr.disk.catalog import RunInfo
    from runmgr.disk.members import Member

_OVERHEAD_BYTES = 1 << 20


def average_checkpoints(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    best: int | None = None,
    epochs: Sequence[int] = (),
    key: str | None = None,
    ckpt_root_dir: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write the mean of checkpoints to `output`, `{"net": …, "members": …}`, and return its path; durable on return.

    `sources` are checkpoint files, the newest last. With `best` (how many, by the metric that the runs monitor, all runs
    together) or `epochs` they are runs, as the commands take them, and may be live; `output` may then be left out for
    one run that has ended: it is its `average_model.pth`. `key` names the model's state dict in the files ("net").

    Sums are float64, on `device`; each tensor keeps its dtype, and integer and boolean ones are the newest member's.
    Memory stays small whatever the files' size. Every byte that enters was checked; `on_progress` gets bytes read and
    bytes to read. Raises InvalidInput, CheckpointNotFound, CheckpointCorrupt, RunBusy or OSError, and then leaves
    nothing. A plain function of one process: in a distributed training, call it on one rank.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    chosen, runs = _chosen(given, best, epochs, ckpt_root_dir)
    path = _path_of(output, runs)
    _check_place(path, overwrite=overwrite)
    with ExitStack() as stack:
        unique: dict[tuple[Any, ...], tuple[TensorFile, Member]] = {}
        for member in chosen:  # one checkpoint has several names
            file = stack.enter_context(_open(member))
            unique.setdefault(file.identity, (file, member))
        files = [file for file, _ in unique.values()]
        if path.exists() and any(file.path.samefile(path) for file in files if file.path.exists()):
            raise InvalidInput(f"{path} is one of the members; write the average to another file")
        blend = blending.Blend(files, [file.weights(key) for file in files])
        content = {
            "net": blend.net,
            "members": [_described(file, member) for file, member in unique.values()],
            "average": average_checkpoints.__name__,
            "run_id": _common([_word(file, "run_id") for file in files]),
        }
        _check_space(path, blend.size_bytes)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(done, blend.read_bytes)

        with closing(blend.pieces(blending.device_named(device), advance)) as pieces:
            writing.write_filled(content, path, pieces, partial(_check_place, path, overwrite=True))
    return path


def _chosen(
    given: Sequence[str | os.PathLike[str]],
    best: int | None,
    epochs: Sequence[int],
    ckpt_root_dir: str | os.PathLike[str] | None,
) -> tuple[list[Member], list[RunInfo]]:
    if not given:
        raise InvalidInput("there is nothing to average: give checkpoint files, or runs with best= or epochs=")
    if best is not None and epochs:
        raise InvalidInput(f"best={best!r} and epochs={list(epochs)!r} exclude each other; give one of them")
    if best is None and not epochs:
        return members.files(given), []
    runs = members.find_runs(given, ckpt_root_dir)
    return members.best(runs, best) if best is not None else members.of_epochs(runs, epochs), runs


def _path_of(output: str | os.PathLike[str] | None, runs: Sequence[RunInfo]) -> Path:
    if output is not None:
        return Path(output).expanduser().absolute()
    if len(runs) != 1:
        what = f"{len(runs)} runs" if runs else "files"
        raise InvalidInput(f"an average of {what} needs a place of its own: say which with -o FILE (output=…)")
    return RunDirectory(runs[0].path).public_path(AVERAGE_NAME)


def _open(member: Member) -> TensorFile:
    """Open a member and make sure that it is the file that its run recorded."""
    try:
        file = TensorFile(member.path)
    except FileNotFoundError:
        raise CheckpointNotFound(
            f"{member.path} was removed a moment ago; try again, or let it stay with `runmgr pin`",
            path=str(member.path),
        ) from None
    if member.digest and file.digest != member.digest:
        file.close()
        raise integrity.damaged(member.path, "its headers or its table of contents are not the ones that were saved")
    return file


def _described(file: TensorFile, member: Member) -> dict[str, Any]:
    """Say which checkpoint it is, by what the file says of itself: plain data that any torch loads."""
    content, metrics = file.content, file.content.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    numbers = {
        name: value for name, value in metrics.items() if isinstance(name, str) and isinstance(value, (int, float))
    }
    counts = {name: value if isinstance(value := content.get(name), int) else None for name in ("epoch", "step")}
    return counts | {
        "checkpoint": member.path.name,
        "metric": numbers.get(member.monitor) if member.monitor else None,
        "metrics": numbers,
        "run_id": _word(file, "run_id"),
        "path": str(member.path),
        "size_bytes": file.size_bytes,
        "digest": file.digest,
    }


def _word(file: TensorFile, name: str) -> str | None:
    value = file.content.get(name)
    return value if isinstance(value, str) else None


def _common(words: Sequence[str | None]) -> str | None:
    return words[0] if len(set(words)) == 1 else None


def _check_place(path: Path, *, overwrite: bool) -> None:
    """Raise unless a file may appear at `path`: nothing that a run keeps books of is ever replaced."""
    if not path.parent.is_dir():
        raise InvalidInput(f"there is no directory {path.parent} to write {path.name} to")
    if path.is_dir():
        raise InvalidInput(f"{path} is a directory; name a file in it")
    run = RunDirectory(path.parent)
    if run.private_path.name in path.parent.parts:
        raise InvalidInput(f"{path} lies where a run keeps its own files; write the average elsewhere")
    if run.private_path.is_dir() and directory.is_run_id(run.run_id):
        _check_place_in(run, path)
    if path.exists() and not overwrite:
        raise InvalidInput(f"{path} is there already; --force (overwrite=True) replaces it")


def _check_place_in(run: RunDirectory, path: Path) -> None:
    """Leave a run's checkpoints to it, and its average_model.pth while it lives or once it has saved one.

    An attempt's record says what that name is to be; a later attempt, and `verify`, go by it.
    """
    recorded = {name for entry in checkpoints.read_books(run).entries for name in entry.names}
    own = recorded | {run.record_path.name, run.config_path.name}
    if path.name in own or path.name.startswith(CHECKPOINT_PREFIX):
        raise InvalidInput(
            f"{path} is the run's own: its records say what it holds. Write the average elsewhere: -o FILE"
        )
    if path.name == AVERAGE_NAME and lease.is_live(run):
        holder = record.holder_of(run)
        raise RunBusy(
            f"run {run.run_id} is being trained by {holder}, which may save its own {AVERAGE_NAME}. Write the average "
            f"elsewhere: -o FILE (output=…)",
            run_id=run.run_id,
            holder=holder,
            age_s=record.lease_age_s(run) or 0.0,
        )


def _check_space(path: Path, size_bytes: int) -> None:
    """Raise before anything is read when the file cannot fit."""
    needed, free = size_bytes + _OVERHEAD_BYTES, atomic.free_bytes(path.parent)
    if needed > free:
        shown = f"the average needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {shown}", str(path.parent))
