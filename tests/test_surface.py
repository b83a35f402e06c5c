"""The surface is frozen: every command and flag is listed here, and whoever changes one changes this list on purpose."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runmgr import cli

COMMON = "--root --json"
PLOT = "--plot --no-plot"
SURFACE = {
    "ls": f"[experiment] -n/--limit --all --status --tag --where --newer-than --older-than {COMMON}",
    "latest": f"experiment {COMMON}",
    "best": f"experiment --metric --mode {COMMON}",
    "show": f"run {PLOT} {COMMON}",
    "path": f"run [file] {COMMON}",
    "compare": f"run... --all {PLOT} {COMMON}",
    "logs": f"run -f/--follow --rank -n/--lines --wait {COMMON}",
    "completion": "shell",
    "verify": f"[run] --all --deep {COMMON}",
    "tag": f"run tag... {COMMON}",
    "untag": f"run tag... {COMMON}",
    "pin": f"run [file] {COMMON}",
    "unpin": f"run [file] {COMMON}",
    "export": f"run [file] target {COMMON}",
    "rm": f"run... {COMMON}",
    "restore": f"run... {COMMON}",
    "prune": f"experiment --keep-last --keep-best --older-than --metric --mode --yes {COMMON}",
    "purge": f"experiment [run...] --older-than --yes {COMMON}",
    "average": f"sources... --best --epochs -o/--output --key --device --force {COMMON}",
    "doctor": "path --json",
    "tensorboard": f"[runs...] -n/--limit --port {COMMON}",
}


def _shown(action):
    if action.option_strings:
        return "/".join(action.option_strings)
    return {None: "{}", "?": "[{}]", "+": "{}...", "*": "[{}...]"}[action.nargs].format(action.dest)


def _commands():
    (commands,) = (action for action in cli.build_parser()._actions if isinstance(action.choices, dict))
    return commands.choices


def test_every_command_and_flag_is_listed_here():
    found = {name: " ".join(map(_shown, command._actions[1:])) for name, command in _commands().items()}
    assert found == SURFACE


def test_every_command_is_found_where_it_is_declared():
    """Only the file of the command that is given is loaded, so each must declare what the table says of it."""
    for name in SURFACE:
        assert cli.build_parser(name).format_help().count("\n    ") >= 1
        assert name in cli.build_parser(name).format_help()
    assert set(SURFACE) == {name for names in cli._COMMANDS.values() for name in names}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_flag(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, flags in SURFACE.items():
        assert name in script
        for flag in flags.split():
            if flag.startswith("--"):
                assert flag.removeprefix("--") in script


def test_bash_completes_commands_and_flags(tmp_path):
    script = tmp_path / "runmgr"
    script.write_text(subprocess.run(
        [sys.executable, "-m", "runmgr.cli", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout)  # fmt: skip
    ask = (
        f"source {script}; COMP_WORDS=($1); COMP_CWORD=$2; COMP_TYPE=9; _shtab_runmgr runmgr; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def completed(words, number):
        done = subprocess.run(["bash", "-c", ask, "bash", words, str(number)], capture_output=True, text=True)
        return set(done.stdout.split())

    assert {"compare", "completion"} <= completed("runmgr comp", 1)
    assert {"--metric", "--mode"} <= completed("runmgr best --m", 2)
