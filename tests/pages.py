"""The documents' pages as a reader follows them: their files written, their commands given to a shell, in that order.

A block of code whose first line is a comment with a file's name (`# train.py`; the second, after `#!`) is that file, in
a fresh project. A `console` block holds commands, `$ runmgr ls`, which go on after a newline with `> `, each with what it
prints, on stderr too. A line `…` stands for lines left out, and `…` at a line's end for the rest of it. The runs of a page
are known by their order; times, sizes and fractions of four digits or more may differ.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

from processes import REPOSITORY, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "benchmarks/README.md"]
)
RUN_ID = r"RUN_\d{8}_\d{6}_\d{6}"
VARIABLE = (
    (r"\d{4}-\d\d-\d\dT[\d:]{8}[\d.+:]*", "time"),
    (r"\d{8}_\d{6}_\d{6}", "time"),
    (r"tfevents\.\S*", "tfevents"),
    (r"[\d.]+ ([kMG]?B|s|ms|min)\b", r"number \1"),
    (r"\b\d+\.\d{4,}(e-?\d+)?", "number"),
    (r"packages \d+;", "packages;"),
)


class Told(NamedTuple):
    """What a page says that a command prints, and what it printed."""

    command: str
    shown: str
    real: str
    status: int


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in _fenced(text) if found == language]


def project(folder: Path, **variables: str) -> dict[str, str]:
    """Make an empty project with `python`, `torchrun` and `runmgr` on its PATH; return the environment for it."""
    (folder / "pyproject.toml").touch()
    (folder / "bin").mkdir()
    for name, options in (("torchrun", "-m torch.distributed.run"), ("runmgr", "-m runmgr.cli"), ("python", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    environ = clean_environment(COLUMNS="80", OMP_NUM_THREADS="1", **variables)
    environ.pop("RUNMGR_CKPT_ROOT_DIR", None)
    environ["PATH"] = f"{folder / 'bin'}:{environ['PATH']}"
    return environ


def follow(text: str, folder: Path, environ: dict[str, str]) -> Iterator[Told]:
    """Do what a page says, and yield what each command printed."""
    shell = subprocess.Popen(
        ["bash"], cwd=folder, env=environ, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    shown_runs, real_runs = sorted(set(re.findall(RUN_ID, "".join(blocks(text, "console"))))), set()
    try:
        for language, code in _fenced(text):
            if name := _file_name(code):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(code)
            if language != "console":
                continue
            for command, shown in _commands(code):
                runs = dict(zip(shown_runs, sorted(real_runs), strict=False))
                real, status = _give(shell, re.sub(RUN_ID, lambda found, runs=runs: runs[found[0]], command))
                real_runs.update(path.name for path in folder.glob("**/RUN_*") if re.fullmatch(RUN_ID, path.name))
                real = real.replace(str(folder), "/home/you/project")
                yield Told(command, mask(shown, shown_runs), mask(real, sorted(real_runs)), status)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()


def agrees(told: Told) -> bool:
    """Whether a page is right: also about a failure, which it must show in full."""
    left_out = "…" in told.shown
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in told.shown.splitlines()
    )
    return re.fullmatch(pattern, told.real) is not None and not (left_out and told.status)


def mask(text: str, runs: list[str]) -> str:
    for place, run_id in enumerate(runs):
        text = text.replace(run_id, f"RUN {place}")
    for pattern, word in VARIABLE:
        text = re.sub(pattern, word, text)
    return "".join(" ".join(line.split()) + "\n" for line in text.splitlines())


def _fenced(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _file_name(code: str) -> str | None:
    named = re.match(r"(?:#!.*\n)?# ([\w./-]+\.\w+)\n", code)
    return named and named[1]


def _commands(code: str) -> list[tuple[str, str]]:
    found = re.findall(r"^\$ (.*\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", code, flags=re.MULTILINE)
    return [(command.replace("\n> ", "\n"), output) for command, output in found]


def _give(shell: subprocess.Popen[str], command: str) -> tuple[str, int]:
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{{ {command}}} </dev/null\nprintf '\\nthe-command-ended %s\\n' $?\n")
    shell.stdin.flush()
    output = ""
    for line in shell.stdout:
        if line.startswith("the-command-ended "):
            return output.removesuffix("\n"), int(line.split()[1])
        output += line
    raise AssertionError(f"the shell ended in {command!r} after {output!r}")
