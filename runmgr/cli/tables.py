"""What a command prints: JSON, tables and facts; coloured and fitted to the width for a person, plain in a pipe."""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TextIO

    from rich.console import Console
    from rich.progress import Progress

_PATIENCE_S = 0.5
_GAP = "  "
_STYLES = {"running": "green", "lost": "red", "failed": "red", "interrupted": "yellow", "preempted": "yellow"}


class Column(NamedTuple):
    """A column's head, and how soon it is left out where the terminal is too narrow: the highest first, 0 never.

    One that `folds` is made narrower instead, its values going on in the next line.
    """

    head: str
    dispensable: int = 0
    is_number: bool = False
    folds: bool = False


def is_for_a_person(stream: TextIO | None = None) -> bool:
    """Whether what is printed goes to a terminal that can do more than print letters."""
    stream = sys.stdout if stream is None else stream
    return stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}


def print_json(value: Any) -> None:
    """Print what `--json` asks for."""
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def printable(value: object) -> str:
    """Return a value as one line of text that cannot steer a terminal; None is nothing."""
    text = "" if value is None else str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or "\ud800" <= char <= "\udfff" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return " " if char in "\n\t" else char.encode("unicode_escape").decode()


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their heads. On a terminal what does not fit is left out, column by column, and named."""
    cells = [[printable(value) for value in row] for row in rows]
    if is_for_a_person():
        _print_rich(list(columns), cells)
        return
    table = [[column.head for column in columns], *cells]
    widths = [max(_width(row[place]) for row in table) for place in range(len(columns))]
    for row in table:
        filled = (_filled(cell, width, column) for cell, width, column in zip(row, widths, columns, strict=True))
        print(_GAP.join(filled).rstrip())


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print names with their values, one a line; those without a value are left out."""
    shown = [(name, text) for name, value in facts if (text := printable(value))]
    width = max((len(name) for name, _ in shown), default=0)
    if not is_for_a_person():
        for name, text in shown:
            print(f"{name:<{width}}{_GAP}{text}")
        return
    from rich.text import Text

    screen = console()
    for name, text in shown:  # wrapped by the terminal itself, so that a path can be copied
        line = Text.assemble((f"{name:<{width}}", "bold"), _GAP, (text, _STYLES.get(text, "")))
        screen.print(line, soft_wrap=True)


def print_line(text: str, *, style: str | None = None) -> None:
    """Print a line, coloured for a person."""
    if not (style and is_for_a_person()):
        print(text)
        return
    from rich.text import Text

    console().print(Text(text, style=style), soft_wrap=True)


def width() -> int:
    """Return how many columns there are to print in."""
    import shutil

    return shutil.get_terminal_size().columns


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes how many of how many are done and draws it on a terminal's stderr, if it lasts."""
    bar: Progress | None = None
    begun = time.monotonic()

    def hear(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            if time.monotonic() - begun < _PATIENCE_S or not is_for_a_person(sys.stderr):
                return
            bar = _started_bar(what, total)
        bar.update(bar.task_ids[0], completed=done)

    try:
        yield hear
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def counting(what: str, total: int, *, unit: int = 1) -> Iterator[Callable[[int], None]]:
    """Like `progress`, for what says how much more is done, from any thread; drawn in multiples of `unit`."""
    done, lock = 0, threading.Lock()
    with progress(what) as hear:

        def add(more: int) -> None:
            nonlocal done
            with lock:
                done += more
                hear(done // unit, total // unit)

        yield add


def _started_bar(what: str, total: int) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*parts, console=console(stderr=True), transient=True)
    bar.add_task(what, total=total)
    bar.start()
    return bar


def console(*, stderr: bool = False) -> Console:
    """Return rich's console; it heeds NO_COLOR, TERM and COLUMNS."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _print_rich(columns: list[Column], cells: list[list[str]]) -> None:
    from rich.cells import cell_len
    from rich.table import Table

    screen = console()
    widths = [
        max(cell_len(text) for text in (column.head, *(row[place] for row in cells)))
        for place, column in enumerate(columns)
    ]
    kept = set(range(len(columns)))
    for place in sorted(kept, key=lambda place: columns[place].dispensable, reverse=True):
        if columns[place].dispensable and sum(widths[one] for one in kept) + len(_GAP) * (len(kept) - 1) > screen.width:
            kept.discard(place)
    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style="bold")
    for place in sorted(kept):
        column = columns[place]
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        least = None if column.folds else widths[place]
        table.add_column(column.head, justify=justify, no_wrap=not column.folds, min_width=least, overflow="fold")
    for row in cells:
        table.add_row(*(_styled(row[place]) for place in sorted(kept)))
    screen.print(table, soft_wrap=not any(column.folds for column in columns))
    if left_out := ", ".join(columns[place].head for place in range(len(columns)) if place not in kept):
        print(f"too narrow for {left_out}", file=sys.stderr)


def _styled(text: str) -> Any:
    from rich.text import Text

    return Text(text, style=_STYLES.get(text, ""))


def _filled(text: str, width: int, column: Column) -> str:
    space = " " * (width - _width(text))
    return space + text if column.is_number else text + space


def _width(text: str) -> int:
    """Return how many places a terminal needs for a text; East Asian letters and most emoji take two."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
