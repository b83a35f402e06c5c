"""The command line: `runmgr ls | show | path | latest | verify | pin | unpin | doctor`. Never imports torch."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 not found or refused, 2 wrong usage, 130 after Ctrl-C."""
    from runmgr.errors import RunError

    parser = build_parser()
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and flags."""
    import argparse

    from runmgr.cli import care, doctor, look

    parser = argparse.ArgumentParser(
        prog="runmgr", description="Look at and care for the runs of your trainings.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(command=_version_or_help, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    look.add_commands(commands)
    care.add_commands(commands)
    doctor.add_commands(commands)
    return parser


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
