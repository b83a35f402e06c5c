"""What commands take: a reference to a run, the root, `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runmgr.disk import catalog, directory, references

if TYPE_CHECKING:
    import argparse

    from runmgr.disk.catalog import RunInfo

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
REFERENCE = (
    "EXPERIMENT (its latest run), EXPERIMENT/best, EXPERIMENT@-2 (last but one), RUN_…, EXPERIMENT/RUN_…, or a path"
)


def add_common_options(command: argparse.ArgumentParser) -> None:
    """Declare what every command takes."""
    command.add_argument(
        "--root", metavar="DIR", help="where experiments lie ($RUNMGR_CKPT_ROOT_DIR, else the project's checkpoints/)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def root_of(given: argparse.Namespace) -> Path:
    """Return the root that is meant: a command belongs to the project it is typed in."""
    return directory.resolve_root(given.root) if given.root else directory.default_root(Path.cwd())


def experiments(root: Path) -> list[str]:
    """Return the names of the experiments under a root, without what can be none."""

    def is_name(name: str) -> bool:
        try:
            directory.check_name(name, "experiment name")
        except ValueError:
            return False
        return True

    return list(filter(is_name, catalog.list_experiments(root)))


def find(given: argparse.Namespace, reference: str | None = None) -> RunInfo:
    """Return the run that a command's `run` argument, or another `reference`, means; raises RunNotFound or InvalidName."""
    return references.find_run(given.run if reference is None else reference, root_of(given))


def positive(text: str) -> int:
    """Read a whole number above 0, for `type=`."""
    import argparse

    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def age_s(text: str) -> float:
    """Read an age such as 30m, 12h, 7d or 2w as seconds, for `type=`."""
    import argparse

    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not (number.isascii() and number.replace(".", "", 1).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write a number and s, m, h, d or w, such as 7d")
    return float(number) * _UNITS_S[unit]


def condition(text: str) -> str:
    """Check a condition such as val/accuracy>0.9, for `type=`."""
    import argparse

    from runmgr.disk.filters import Condition
    from runmgr.errors import InvalidInput

    try:
        Condition.parse(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
