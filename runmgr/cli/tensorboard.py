"""`tensorboard`: TensorBoard over runs, under names that say how they differ."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from runmgr.cli import references, tables
from runmgr.disk import board, directory
from runmgr.disk.directory import Experiment
from runmgr.errors import RunError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from runmgr.disk.directory import RunDirectory

_REFRESH_S = 5.0  # as often as TensorBoard itself looks for more
_START_LIMIT_S = 120.0
_ADDRESS = re.compile(r"TensorBoard \S+ at (https?://\S+)")
# TensorBoard, ended when the process that started it lets go of the pipe, whatever ended that one; its folder goes as well.
_UNTIL_ALONE = """
import atexit, os, shutil, signal, sys, threading
from tensorboard import main
atexit.register(shutil.rmtree, sys.argv.pop(1), ignore_errors=True)
threading.Thread(target=lambda: (os.read(0, 1), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
main.run_main()
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command of this file."""
    command = commands.add_parser(
        "tensorboard", help="start TensorBoard over runs, on a free port of this host", allow_abbrev=False,
        usage="%(prog)s [-h] [-n LIMIT] [--port PORT] [--root DIR] [--json] [EXPERIMENT|RUN ...] [-- OPTION ...]",
        epilog="What follows -- goes to TensorBoard itself, such as -- --samples_per_plugin=scalars=0",
    )  # fmt: skip
    command.add_argument("runs", nargs="*", metavar="EXPERIMENT|RUN", help="all experiments, if none is given")
    command.add_argument(
        "-n", "--limit", type=references.positive, default=100, help="how many of an experiment's newest runs (100)"
    )
    command.add_argument("--port", type=int, default=0, help="the port to serve at (a free one)")
    command.set_defaults(command=_tensorboard)
    references.add_common_options(command)
    _split_at_dashes(command)


def _split_at_dashes(command: argparse.ArgumentParser) -> None:
    """Let the parser put what follows `--` aside: argparse would take it for more runs."""
    parse = command.parse_known_args

    def parse_before_dashes(given: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
        words = list(given)
        end = words.index("--") if "--" in words else len(words)
        found, unknown = parse(words[:end], namespace)
        found.options = words[end + 1 :]
        return found, unknown

    command.parse_known_args = parse_before_dashes  # type: ignore[method-assign, assignment]


def _tensorboard(given: argparse.Namespace) -> int:
    """Serve until Ctrl-C; runs and attempts that begin meanwhile appear by themselves."""
    root = references.root_of(given)
    if importlib.util.find_spec("tensorboard") is None:
        raise RunError(f"tensorboard is not installed for {sys.executable}; pip install tensorboard")
    runs, experiments = _meant(given, root)
    shown = board.Board(runs, experiments, None if given.runs else root, given.limit)
    folder = Path(tempfile.mkdtemp(prefix="runmgr-tensorboard-"))
    with _Server(folder, [f"--port={given.port}", *given.options]) as server:
        shown.refresh(folder)
        address = server.address()
        if given.json:
            listed = [{"name": name, "run_id": run.run_id, "path": str(run.path)} for name, run in shown.shown]
            tables.print_json({"address": address, "runs": listed, "num_left_out": shown.num_left_out})
        else:
            print(_sentence(shown, " ".join(given.runs) or str(root), address))
        sys.stdout.flush()
        while server.is_running(for_s=_REFRESH_S):
            with suppress(OSError):  # the file server is away: what is shown already stays
                shown.refresh(folder)
    raise RunError("TensorBoard has ended by itself")


def _meant(given: argparse.Namespace, root: Path) -> tuple[list[RunDirectory], list[Experiment]]:
    """Return the runs, and the experiments with all of their runs, that the words stand for."""
    runs, experiments = [], []
    for word in given.runs:
        is_path = "/" in word.rstrip("/") or word in {".", ".."}
        path = Path(os.path.normpath(Path(word).expanduser().absolute() if is_path else root / word))
        if word and path.is_dir() and not any(directory.is_run_id(part) for part in path.parts):
            experiments.append(Experiment(path.parent, path.name))
        else:
            runs.append(directory.RunDirectory(references.find(given, word).path))
    return runs, experiments


def _sentence(shown: board.Board, what: str, address: str) -> str:
    count = len(shown.shown)
    runs = f"{count or 'no'} run{'' if count == 1 else 's'} of {tables.printable(what)}"
    more = f" without {shown.num_left_out} older ones (--limit)" if shown.num_left_out else ""
    later = "" if count else " yet; they appear once they have logged something"
    return f"TensorBoard shows {runs}{more}{later}: {address} (Ctrl-C ends it)"


class _Server:
    """TensorBoard in a process of its own, which ends, and removes its folder, when this process does."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._folder = folder
        self._options = options
        self._said: list[str] = []
        self._address: str | None = None
        self._has_started = threading.Event()
        self._is_ending = False

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, without a shell
            [sys.executable, "-c", _UNTIL_ALONE, str(self._folder), f"--logdir={self._folder}", *self._options],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ending = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def address(self) -> str:
        """Wait until it serves and return where; raises RunError with its own words if it does not."""
        self._has_started.wait(_START_LIMIT_S)
        if self._address is None:
            raise RunError("TensorBoard did not start: " + (" ".join("".join(self._said).split()) or "it said nothing"))
        return self._address

    def is_running(self, *, for_s: float) -> bool:
        """Wait, and say whether it still serves then."""
        try:
            self._process.wait(for_s)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _read(self) -> None:
        """Find the address in what it says, and pass on what it says later."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self._address is not None:
                if not self._is_ending:
                    print(line, end="", file=sys.stderr)
            elif found := _ADDRESS.search(line):
                self._address = found[1]
                self._has_started.set()
            else:
                self._said.append(line)
        self._has_started.set()
