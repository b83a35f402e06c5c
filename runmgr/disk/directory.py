"""The run directory and its experiment: the names of what lies there.

::

    <ckpt_root_dir>/<experiment_name>/
    ├── .runmgr/                      create.lock, last_run_id/, launches/, trash/
    └── RUN_20261123_153000_123456/   one run, see RunDirectory
"""

from __future__ import annotations

import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from runmgr.disk import atomic
from runmgr.errors import InvalidInput, InvalidName

RUN_PREFIX = "RUN_"
RUN_ID_FORMAT = "RUN_%Y%m%d_%H%M%S_%f"
LATEST_NAME = "ckpt_latest.pth"
BEST_NAME = "ckpt_best.pth"
AVERAGE_NAME = "average_model.pth"
EVENTS_PREFIX = "events.out.tfevents."  # what TensorBoard reads; it writes the rest of the name
CHECKPOINT_PREFIX = "ckpt_"
EPOCH_PREFIX = f"{CHECKPOINT_PREFIX}epoch_"
SHORT_NAMES = {"latest": LATEST_NAME, "best": BEST_NAME, "average": AVERAGE_NAME}
_RUN_ID = re.compile(r"RUN_(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)(\d\d)_(\d{6})")
_LOG = re.compile(r"log_\d{8}_\d{6}_\d{6}(?:_rank(\d+))?\.txt")
_NAME_LIMIT_BYTES = 200
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
ROOT_VARIABLE = "RUNMGR_CKPT_ROOT_DIR"
_PROJECT_MARKS = (".git", "pyproject.toml", "requirements.txt", ".env", "venv", "setup.py")


def check_name(name: object, kind: str) -> str:
    """Return `name` if it is safe as one path component and one word of output, else raise InvalidName."""
    if isinstance(name, str) and _PLAIN_NAME.fullmatch(name):  # nearly all
        return name
    if not isinstance(name, str):
        raise InvalidName(f"{kind} must be a string, not {type(name).__name__}", name=repr(name), kind=kind)
    encoded = name.encode(errors="surrogateescape")
    problem = None
    if not name or name.isspace():
        problem = "is empty"
    elif len(encoded) > _NAME_LIMIT_BYTES:
        problem = f"is {len(encoded)} bytes long; at most {_NAME_LIMIT_BYTES} fit"
    elif "/" in name:
        problem = "contains a slash, so it would leave its directory"
    elif name[0] in ".-":
        problem = f"starts with {name[0]!r}, which hides it or makes it look like an option"
    elif any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or char in "\u2028\u2029" for char in name):
        problem = "contains a control character"
    elif any(0xD800 <= ord(char) < 0xE000 for char in name):
        problem = "is not valid Unicode"
    if problem:
        shown = ascii(name if len(name) <= 60 else name[:57] + "...")
        raise InvalidName(
            f"{kind} {shown} {problem}. Use letters, digits, '_', '-', '.', spaces or emoji.",
            name=name,
            kind=kind,
        )
    return name


def default_root(start: Path | None = None) -> Path:
    """Return `$RUNMGR_CKPT_ROOT_DIR`, else `checkpoints/` in the project that holds the launched script (or `start`).

    A project is the nearest directory upwards with .git, pyproject.toml, requirements.txt, .env, venv or setup.py;
    without one it is the working directory. In a notebook, and for an installed module, it is the project of the working
    directory. Nothing is created.
    """
    if given := os.environ.get(ROOT_VARIABLE):
        return Path(given).expanduser().absolute()
    start = start or launched_from()
    for directory in (start, *start.parents):
        if any((directory / mark).exists() for mark in _PROJECT_MARKS):
            return directory / "checkpoints"
    return Path.cwd() / "checkpoints"


def launched_from() -> Path:
    """Return the directory of the launched script.

    Without one (a notebook, `python -c`), and for an installed module (`python -m`), it is the working directory.
    """
    given = Path(sys.argv[0] if sys.argv else "")
    main = getattr(sys.modules["__main__"], "__file__", None)  # absolute: the script may have left its directory
    if main is None:  # in a notebook sys.argv names the kernel's launcher, somewhere in site-packages
        return Path.cwd()
    found = (Path(main) if Path(main).name == given.name else given).resolve().parent
    return Path.cwd() if {"site-packages", "dist-packages"} & set(found.parts) else found


def resolve_root(ckpt_root_dir: str | os.PathLike[str] | None) -> Path:
    """Return the absolute root: the one given, else the default one."""
    if ckpt_root_dir is None:
        return default_root()
    text = os.fspath(ckpt_root_dir)
    if not text or "\0" in text:
        raise InvalidInput(f"ckpt_root_dir={text!r} is not a path; give a directory, or None for the default one")
    return Path(text).expanduser().absolute()


class Experiment(NamedTuple):
    """A named recipe's directory, which holds its runs."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        """Where the runs lie."""
        return self.root / self.name

    @property
    def lock_path(self) -> Path:
        """The file whose lock keeps new runs in order."""
        return self.path / ".runmgr" / "create.lock"

    @property
    def last_run_id_path(self) -> Path:
        """A directory of empty files, each named by a run id; the greatest is the last one given out."""
        return self.path / ".runmgr" / "last_run_id"

    @property
    def launches_path(self) -> Path:
        """Which run a launch made: the files of `disk/launches.py`."""
        return self.path / ".runmgr" / "launches"

    @property
    def trash_path(self) -> Path:
        """Where removed runs lie until they are restored or purged, each under its own name."""
        return self.path / ".runmgr" / "trash"

    @property
    def purging_path(self) -> Path:
        """What is being deleted for good: no run any more, whatever of it is still there."""
        return self.path / ".runmgr" / "purging"

    def run(self, run_id: str) -> RunDirectory:
        """Return the directory of one run, there or not."""
        return RunDirectory(self.path / run_id)


class RunDirectory(NamedTuple):
    """Every name in a run directory, once."""

    path: Path

    @property
    def run_id(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def experiment(self) -> Experiment:
        """The experiment that it lies in."""
        return Experiment(self.path.parent.parent, self.path.parent.name)

    def public_path(self, name: str) -> Path:
        """Return a file's place for everybody to see; "latest", "best" and "average" stand for their checkpoints."""
        return self.path / check_name(SHORT_NAMES.get(name, name), "file name")

    @property
    def record_path(self) -> Path:
        """run.json: what, when, where, by whom, status."""
        return self.path / "run.json"

    @property
    def config_path(self) -> Path:
        """config.json: the configuration of attempt 1."""
        return self.path / "config.json"

    @property
    def private_path(self) -> Path:
        """The part that is ours alone."""
        return self.path / ".runmgr"

    @property
    def objects_path(self) -> Path:
        """Where the checkpoint files lie under their own names."""
        return self.private_path / "checkpoints"

    @property
    def pins_path(self) -> Path:
        """Empty files, named by the objects that are to stay whatever `keep` says."""
        return self.private_path / "pins"

    @property
    def tags_path(self) -> Path:
        """Empty files, named by the tags that were given to the run after its start."""
        return self.private_path / "tags"

    @property
    def attempts_path(self) -> Path:
        """Where each attempt keeps its record."""
        return self.private_path / "attempts"

    @property
    def failures_path(self) -> Path:
        """Where ranks that died left their last words."""
        return self.private_path / "failures"

    def failure_path(self, attempt: int, rank: int, kind: str) -> Path:
        """Return the report of one rank in one attempt; `kind` is "cause" or "consequence"."""
        return self.failures_path / f"{attempt:04d}-{rank:05d}-{kind}.json"

    @property
    def lease_path(self) -> Path:
        """The live writer's mark."""
        return self.private_path / "lease"

    @property
    def token_path(self) -> Path:
        """A word that only the launch that made the run knows."""
        return self.private_path / "token"

    @property
    def manifest_path(self) -> Path:
        """A summary of the attempts' records for readers; derived, never read back."""
        return self.private_path / "manifest.json"

    def attempt_path(self, attempt: int) -> Path:
        """Return the record of one attempt."""
        return self.attempts_path / f"{attempt:04d}.json"

    def sync(self) -> None:
        """Make the skeleton durable, from the checkpoints' directory up to the root: once, before the first save."""
        for directory in (
            self.objects_path,
            self.private_path,
            self.path,
            self.path.parent,
            self.path.parent.parent,
        ):
            atomic.sync_directory(directory)

    def log_path(self, started: str, rank: int) -> Path:
        """Return one rank's log file in the attempt that began at `started`."""
        return self.path / (f"log_{started}.txt" if rank == 0 else f"log_{started}_rank{rank}.txt")

    def console_path(self, started: str, rank: int) -> Path:
        """Return where one rank's standard output and error go, if they are captured."""
        return self.path / (f"console_{started}.txt" if rank == 0 else f"console_{started}_rank{rank}.txt")

    def logs(self) -> list[tuple[int, Path]]:
        """Return the log files that there are, each with its rank, oldest first."""
        found = sorted((name, log) for name in os.listdir(self.path) if (log := _LOG.fullmatch(name)))
        return [(int(log[1] or 0), self.path / name) for name, log in found]


def timestamp(now_us: int) -> str:
    """Write microseconds since 1970 the way run ids and log names do, in UTC."""
    return _moment(now_us).strftime(RUN_ID_FORMAT.removeprefix(RUN_PREFIX))


def now_us() -> int:
    """Return this host's clock, in microseconds since 1970."""
    return time.time_ns() // 1000


def is_run_id(name: str) -> bool:
    """Whether `name` looks like a run directory's, ours or super-gradients'."""
    return name.startswith(RUN_PREFIX)


def _moment(us: int) -> datetime:
    seconds, rest = divmod(us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def moment_us(run_id: str) -> int | None:
    """Return the microseconds in a run id, or None when it is somebody else's name."""
    match = _RUN_ID.fullmatch(run_id)
    if match is None:
        return None
    year, month, day, hour, minute, second, us = map(int, match.groups())
    try:  # not strptime, which would be imported while the lock is held
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    return int(moment.timestamp()) * 1_000_000 + us
