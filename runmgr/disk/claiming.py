"""Create a run directory exactly once, see that all hosts have it, and take it back when a start fails."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from runmgr.disk import atomic
from runmgr.disk.directory import (
    ROOT_VARIABLE,
    RUN_PREFIX,
    Experiment,
    RunDirectory,
    is_run_id,
    moment_us,
    now_us,
    timestamp,
)
from runmgr.errors import NotShared, RunError

if TYPE_CHECKING:
    from pathlib import Path

_CLAIM_ATTEMPTS = 10_000
_SKELETON_ATTEMPTS = 20

_made_here: set[Path] = set()  # directories above the runs that this process made


def create_run(experiment: Experiment, token: str) -> tuple[RunDirectory, str | None]:
    """Create the next run of `experiment` and put `token` in it; also returns why the lock could not be had, or None.

    The id is greater than that of every run whose creation had ended before this call, on any host and whatever the
    clocks say. Rivals never share a directory: `os.mkdir` is the claim, the lock only keeps order. Nothing is synced
    here: there is nothing to lose yet, and `RunDirectory.sync` comes before the first save.
    """
    for _ in range(_SKELETON_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):  # a rival that gave up took the new experiment away again
            return _create_run(experiment, token)
    return _create_run(experiment, token)


def _create_run(experiment: Experiment, token: str) -> tuple[RunDirectory, str | None]:
    made: list[Path] = []
    make_directories(experiment.last_run_id_path, made)
    _made_here.update(made)
    with atomic.locked(experiment.lock_path) as without_lock:
        run = _claim(experiment)
        try:
            _mark_last(experiment, run.run_id)
        except BaseException:
            remove_unused(run)
            raise
    try:
        for directory in (run.private_path, run.objects_path, run.attempts_path):
            directory.mkdir(exist_ok=True)  # somebody may have tagged the newest run a moment ago
        run.token_path.write_text(token)
    except BaseException:
        remove_unused(run)
        raise
    return run, without_lock


def _claim(experiment: Experiment) -> RunDirectory:
    last = _last_us(experiment)
    candidate = max(now_us(), last + 1)
    for _ in range(_CLAIM_ATTEMPTS):
        run = experiment.run(RUN_PREFIX + timestamp(candidate))
        try:
            os.mkdir(run.path)  # the claim itself, without any exist_ok
        except FileExistsError:
            candidate += 1
        except PermissionError:  # sshfs says EPERM to the loser of a race
            if not run.path.exists():
                raise
            candidate += 1
        else:
            return run
    raise RunError(
        f"{_CLAIM_ATTEMPTS} run ids in a row from {RUN_PREFIX + timestamp(candidate - _CLAIM_ATTEMPTS)} were taken in "
        f"{experiment.path}; is its clock or file system stuck?"
    )


def _last_us(experiment: Experiment) -> int:
    """Return the greatest id given out, in microseconds; lists the runs only when no mark is there yet."""
    run_ids = [
        name for name in os.listdir(experiment.last_run_id_path) or os.listdir(experiment.path) if is_run_id(name)
    ]
    while run_ids:  # one round, but for names that only look like run ids
        greatest = max(run_ids)
        if (moment := moment_us(greatest)) is not None:
            return moment
        run_ids.remove(greatest)
    return 0


def _mark_last(experiment: Experiment, run_id: str) -> None:
    """Say that `run_id` was given out, then clear away the marks of smaller ids.

    A mark is removed only by somebody who saw a greater one, so the greatest always stays, with or without the lock.
    """
    marks = experiment.last_run_id_path
    os.close(os.open(marks / run_id, os.O_WRONLY | os.O_CREAT, 0o666))
    *smaller, _ = sorted(name for name in os.listdir(marks) if is_run_id(name))
    for name in smaller:
        atomic.remove(marks / name)


def remember_last(experiment: Experiment) -> None:
    """Mark the greatest id given out, before a run is moved away: in an experiment of another program nothing else does."""
    make_directories(experiment.last_run_id_path, [])
    if not os.listdir(experiment.last_run_id_path):
        run_ids = [name for name in os.listdir(experiment.path) if moment_us(name) is not None]
        if run_ids:
            _mark_last(experiment, max(run_ids))


def confirm_shared(run: RunDirectory, token: str, *, host: str, timeout_s: float = 60.0) -> None:
    """Check from this host that `run` is the very directory that rank 0 made, else raise NotShared.

    `mkdir` asks the file server, which a stat may not: EEXIST means that the directory is there, and its token tells
    whose it is; success, for it or for one above it, means that this host has a disk of its own, and what was made is
    removed again. The ones above are asked too: a client that looked for them before they were there may believe for
    seconds that they are still missing, and asking ends that.
    """
    made: list[Path] = []
    try:
        make_directories(run.path, made)  # the question itself
    except PermissionError:  # the token decides
        pass
    except OSError as error:
        raise _not_shared(run, host, f"{error.filename}: {error.strerror}") from None
    finally:
        for directory in reversed(made):
            with contextlib.suppress(OSError):  # somebody else's file in it: then it is in use there
                directory.rmdir()
    if made:
        raise _not_shared(run, host, f"{made[0]} was missing there")
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    while True:
        found = None
        with contextlib.suppress(OSError):  # a lagging view: ask again until the deadline
            found = run.token_path.read_text()
        if found == token:
            return
        if time.monotonic() > deadline:
            raise _not_shared(run, host, f"the directory there holds {'another' if found else 'no'} token")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def _not_shared(run: RunDirectory, host: str, found: str) -> NotShared:
    return NotShared(
        f"host {host} does not see the run directory {run.path} that rank 0 made: {found}. All hosts of a launch need "
        f"one shared file system; choose ckpt_root_dir (or ${ROOT_VARIABLE}) on it.",
        host=host,
        path=str(run.path),
    )


def make_directories(path: Path, made: list[Path]) -> None:
    """Make `path` and what is missing above it, asking the file server about each; adds those it made to `made`."""
    try:
        _make_directory(path, made)
    except FileNotFoundError:
        if path == path.parent:
            raise
        make_directories(path.parent, made)
        _make_directory(path, made)


def _make_directory(path: Path, made: list[Path]) -> None:
    try:
        os.mkdir(path)
    except (FileExistsError, PermissionError) as error:  # sshfs says EPERM to the loser of a race
        if not path.is_dir() and (isinstance(error, PermissionError) or path.exists()):
            raise
    else:
        made.append(path)


def remove_unused(run: RunDirectory) -> None:
    """Take back a run that was created a moment ago and in which nothing has been saved.

    With it goes the experiment, and the root, if this process made them and nobody else has put anything there.
    """
    import shutil

    experiment = run.experiment
    with contextlib.suppress(OSError):  # what cannot be removed is an empty run, and stays one
        shutil.rmtree(run.path)
        if experiment.path in _made_here and not any(map(is_run_id, os.listdir(experiment.path))):
            _remove_skeleton(experiment, run.run_id)


def _remove_skeleton(experiment: Experiment, run_id: str) -> None:
    """Remove an experiment without runs, up to the first directory in which something is left.

    A rival on its way into it either has its mark there, which stops this, or finds the marks gone and begins again.
    """
    atomic.remove(experiment.last_run_id_path / run_id)
    experiment.last_run_id_path.rmdir()
    with contextlib.suppress(FileNotFoundError):
        experiment.launches_path.rmdir()
    atomic.remove(experiment.lock_path)
    for directory in (experiment.lock_path.parent, *experiment.lock_path.parent.parents):
        if directory not in _made_here:
            break
        directory.rmdir()
        _made_here.discard(directory)
