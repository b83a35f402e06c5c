"""Curves drawn in a terminal, with what there is to read off them in words."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any

from runmgr.cli import tables
from runmgr.disk import catalog, events
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from runmgr.disk.catalog import RunInfo
    from runmgr.disk.events import ScalarPoint

_COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_MARKERS = "abcdefghijklmnopqrstuvwxyz"
_HEIGHT, _LEAST_WIDTH, _MOST_WIDTH, _FRAME_WIDTH = 8, 20, 100, 24
_MOST_POINTS = 400


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options of commands that draw."""
    command.add_argument(
        "--plot", metavar="METRIC", action="append",
        help="draw this curve (on a terminal: the monitored metric and the loss); may be given again",
    )  # fmt: skip
    command.add_argument("--no-plot", action="store_true", help="draw nothing")


def draw(given: argparse.Namespace, runs: Sequence[RunInfo]) -> None:
    """Draw the curves that are asked for, those of all runs in one picture; raises RunNotFound where there is no such one."""
    if given.no_plot or not (given.plot or tables.is_for_a_person()):
        return
    found = {run.run_id: events.read_scalars(run) for run in runs}
    names = sorted({name for curves in found.values() for name in curves})
    for wanted in given.plot or ():
        if wanted not in names:
            near = catalog.nearest(wanted, names)
            raise RunNotFound(f"no events of {', '.join(found)} have a curve {wanted!r}{near}", path=str(runs[0].path))
    for name in given.plot or _usual(names, runs):
        print()
        _draw_one(name, {run_id: curves[name] for run_id, curves in found.items() if name in curves})


def _usual(names: list[str], runs: Sequence[RunInfo]) -> list[str]:
    """Choose the monitored metric and a loss: that of training or, without such a name, the first there is."""
    chosen = [run.monitor for run in runs if run.monitor in names][:1]
    losses = [name for name in names if "loss" in name.lower() and name not in chosen]
    losses.sort(key=lambda name: "train" not in name.lower())
    return [*filter(None, chosen), *losses[:1]]


def _draw_one(name: str, curves: dict[str, list[ScalarPoint]]) -> None:
    finite = {run_id: [point for point in points if math.isfinite(point.value)] for run_id, points in curves.items()}
    if _can_draw() and any(len(points) > 1 for points in finite.values()):
        print(_picture(tables.printable(name), finite))
    for number, (run_id, points) in enumerate(finite.items()):
        sign = f"{_MARKERS[number % len(_MARKERS)]} " if len(finite) > 1 and not _has_colours() else ""
        who = f" {sign}{run_id}" if len(finite) > 1 else ""
        tables.print_line(f"{tables.printable(name)}{who}: {_words(points, curves[run_id])}", style=_colour(number))


def _words(points: list[ScalarPoint], whole: list[ScalarPoint]) -> str:
    """Say what one reads off a curve."""
    if not points:
        return f"{len(whole)} values, none of them finite"
    least, most = (choose(points, key=lambda point: point.value) for choose in (min, max))
    lost = f", {len(whole) - len(points)} not finite" if len(whole) > len(points) else ""
    return (
        f"min {least.value:.6g} at step {least.step}, max {most.value:.6g} at step {most.step}, "
        f"last {points[-1].value:.6g} at step {points[-1].step}{lost}"
    )


def _picture(name: str, curves: dict[str, list[ScalarPoint]]) -> str:
    import plotille

    figure: Any = plotille.Figure()
    figure.width = max(_LEAST_WIDTH, min(tables.width() - _FRAME_WIDTH, _MOST_WIDTH))
    figure.height = _HEIGHT
    figure.color_mode, figure.with_colors = "names", _has_colours()
    figure.register_label_formatter(float, _label)
    figure.x_label, figure.y_label = "step", name
    steps = [point.step for points in curves.values() for point in points]
    values = [point.value for points in curves.values() for point in points]
    figure.set_x_limits(min_=min(steps), max_=max(*steps, min(steps) + 1))
    margin = (max(values) - min(values)) * 0.02 or abs(values[0]) * 0.1 or 1.0
    figure.set_y_limits(min_=min(values) - margin, max_=max(values) + margin)
    figure.origin = False
    for number, points in enumerate(curves.values()):
        thin = _thinned(points)
        marker = _MARKERS[number % len(_MARKERS)] if len(curves) > 1 and not _has_colours() else None
        figure.plot([point.step for point in thin], [point.value for point in thin], lc=_colour(number), marker=marker)
    return str(figure.show())


def _label(value: float, chars: int, *, delta: float, left: bool = False) -> str:  # noqa: ARG001  # plotille's own names
    text = f"{value:.4g}"
    return text.ljust(chars) if left else text.rjust(chars)


def _thinned(points: list[ScalarPoint]) -> list[ScalarPoint]:
    """Keep the least and the greatest value of each stretch, so that no peak is lost."""
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    if size <= 2:
        return points
    kept: list[ScalarPoint] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {choose(stretch, key=lambda point: point.value) for choose in (min, max)}
        kept += sorted(ends, key=stretch.index)
    return kept


def _colour(number: int) -> str | None:
    return _COLOURS[number % len(_COLOURS)] if _has_colours() else None


def _has_colours() -> bool:
    return tables.is_for_a_person() and not os.environ.get("NO_COLOR")


def _can_draw() -> bool:
    """Whether the output can show the dots that curves are made of."""
    try:
        "⣿".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
