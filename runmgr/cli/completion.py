"""`completion`: what makes a shell complete commands, options and paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runmgr import cli

if TYPE_CHECKING:
    import argparse

_HINT = """\
bash    runmgr completion bash > ~/.local/share/bash-completion/completions/runmgr
zsh     runmgr completion zsh > ~/.zfunc/_runmgr     (a directory in $fpath)
fish    runmgr completion fish > ~/.config/fish/completions/runmgr.fish
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command of this file."""
    import argparse

    completion = commands.add_parser(
        "completion", help="print a script for tab completion", allow_abbrev=False, epilog=_HINT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(command=_completion)


def _completion(given: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(cli.build_parser(), given.shell))
    return 0
