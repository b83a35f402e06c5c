"""The command line, `runmgr COMMAND …`. Never imports torch."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

# Which file declares which commands. Only the file of the command that is given is loaded.
_COMMANDS = {
    "listing": ("ls", "latest", "best"),
    "showing": ("show", "path"),
    "comparing": ("compare",),
    "logs": ("logs",),
    "completion": ("completion",),
    "care": ("verify", "tag", "untag", "pin", "unpin", "export"),
    "removing": ("rm", "restore"),
    "pruning": ("prune", "purge"),
    "average": ("average",),
    "doctor": ("doctor",),
    "tensorboard": ("tensorboard",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 not found or refused, 2 wrong usage, 130 after Ctrl-C."""
    from runmgr.errors import RunError

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _let_everything_be_printed()
    parser = build_parser(arguments[0] if arguments else None)
    given = parser.parse_args(arguments)
    try:
        status = given.command(given)
        sys.stdout.flush()
    except RunError as error:
        print(f"runmgr: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"runmgr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return int(status)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands and flags, or of the one command that is going to be run."""
    import argparse
    from importlib import import_module

    parser = argparse.ArgumentParser(
        prog="runmgr", description="Look at and care for the runs of your trainings.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(command=_version_or_help, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    known = [name for names in _COMMANDS.values() for name in names]
    if command and not command.startswith("-") and command not in known:
        _refuse(parser, command, known)
    for file, names in _COMMANDS.items():
        if command not in known or command in names:
            import_module(f"runmgr.cli.{file}").add_commands(commands)
    return parser


def _refuse(parser: argparse.ArgumentParser, command: str, known: list[str]) -> NoReturn:
    from difflib import get_close_matches

    near = get_close_matches(command, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    parser.error(f"there is no command {command!r}; {hint}")


def _let_everything_be_printed() -> None:
    """Let no name stop a command: bytes that are no UTF-8 pass through, a poorer terminal gets escapes."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            is_utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def _version_or_help(given: argparse.Namespace) -> int:
    if given.version:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("runmgr", version("runmgr"))
        except PackageNotFoundError:  # run from a checkout that is not installed
            print("runmgr (not installed)")
        return 0
    given.parser.print_help()
    return 2
