"""A real `runmgr tensorboard`, and what it answers to a browser."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from processes import clean_environment, descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 60.0
STATUSES = ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")


class Served:
    """What TensorBoard's own HTTP interface says; `names` are the runs as they were at its start."""

    def __init__(self, process: subprocess.Popen[str], told: dict[str, Any]) -> None:
        self.process = process
        self.address = told["address"]
        self.names = [run["name"] for run in told["runs"]]

    def get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return json.loads(answer.read())

    def wait_for_runs(self, count: int) -> list[str]:
        return self.until(lambda: self.get("data/runs"), lambda runs: len(runs) == count)

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        found = self.get(f"data/plugin/scalars/scalars?run={quote(run)}&tag={quote(tag)}")
        return [(step, value) for _, step, value in found]

    def texts(self, run: str, tag: str) -> list[tuple[int, str]]:
        found = self.get(f"data/plugin/text/text?run={quote(run)}&tag={quote(tag)}/text_summary")
        return [(text["step"], text["text"]) for text in found]

    def rows(self) -> list[dict[str, Any]]:
        asked = {"startIndex": 0, "sliceSize": 1000, "allowedStatuses": [f"STATUS_{word}" for word in STATUSES]}
        return self.get("data/plugin/hparams/session_groups", asked | {"colParams": []})["sessionGroups"]

    def until(self, ask: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while not is_right(found := ask()):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


@contextlib.contextmanager
def served(root: Path, *arguments: str) -> Iterator[Served]:
    """Start it, and end it with Ctrl-C; then nothing of it may be left."""
    command = [
        sys.executable,
        "-m",
        "runmgr.cli",
        "tensorboard",
        *arguments[:1],
        "--json",
        f"--root={root}",
        *arguments[1:],
    ]
    with tempfile.TemporaryDirectory() as temporary:
        environ = clean_environment(TMPDIR=temporary)
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                assert process.stdout is not None
                yield Served(process, _first_json(process.stdout))
                processes = descendants(process.pid)
                assert processes
                process.send_signal(signal.SIGINT)
                assert process.wait(LIMIT_S) == 130
                assert_nothing_left(processes, Path(temporary))
            finally:
                process.kill()


def assert_nothing_left(processes: list[int], temporary: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while left := [pid for pid in processes if _runs(pid)] or list(temporary.glob("runmgr-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _first_json(stream: Any) -> dict[str, Any]:
    text = ""
    for line in stream:
        text += line
        with contextlib.suppress(ValueError):
            return json.loads(text)
    raise AssertionError(f"no JSON came: {text!r}")
