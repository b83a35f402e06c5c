"""The curves of a run, read from its TensorBoard events without torch."""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from runmgr.disk.catalog import RunInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = re.compile(r"\.tfevents\.(\d+)(?:.*\.(\d+))?")  # seconds, host, process, count
_LENGTH = struct.Struct("<Q")
_HEAD_BYTES, _TAIL_BYTES = 12, 4  # a length and its checksum, the content, its checksum
_FLOATS = {1: ("float_val", "<f"), 2: ("double_val", "<d")}  # tensorflow's numbers for types


class ScalarPoint(NamedTuple):
    """One value of a curve; `time_s` is when it was written, in seconds since 1970."""

    step: int
    value: float
    time_s: float


def read_scalars(
    run: RunInfo | str | os.PathLike[str], ckpt_root_dir: str | os.PathLike[str] | None = None
) -> dict[str, list[ScalarPoint]]:
    """Return the curves of a run, or of what a reference means, by their names, as TensorBoard shows them.

    What an attempt wrote before it was killed and a later one did again is left out. A file that is being written, or
    damaged, counts as far as it can be read; a run without events has no curves.
    """
    if not isinstance(run, RunInfo):
        from runmgr.disk.references import find_run

        run = find_run(run, ckpt_root_dir)
    curves: dict[str, list[ScalarPoint]] = {}
    for path in event_files(run.path):
        for event in _events(path):
            _add(curves, event)
    return {name: points for name, points in curves.items() if points}


def event_files(run_path: Path) -> list[Path]:
    """Return a run's events files, one an attempt, oldest first."""
    try:
        names = os.listdir(run_path)
    except OSError:  # gone by now, or not ours to look into
        return []
    return [run_path / name for name in sorted(filter(_NAME.search, names), key=_began)]


def _began(name: str) -> tuple[int, int, str]:
    """Order files by the second in which they were begun, then by their count in the process, which has no leading zeros."""
    found = _NAME.search(name)
    return (int(found[1]), int(found[2] or 0), name) if found else (0, 0, name)


def _events(path: Path) -> Iterator[Any]:
    """Yield the events of a file up to where it ends or cannot be read any further."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        content = path.read_bytes()
    except OSError:  # removed meanwhile, or not ours to read
        return
    at = 0
    while at + _HEAD_BYTES <= len(content):
        (length,) = _LENGTH.unpack_from(content, at)
        at += _HEAD_BYTES
        if at + length > len(content):
            return
        try:
            yield Event.FromString(content[at : at + length])
        except DecodeError:
            return
        at += length + _TAIL_BYTES


def _add(curves: dict[str, list[ScalarPoint]], event: Any) -> None:
    if event.HasField("session_log") and event.session_log.status == event.session_log.START:
        for name, points in curves.items():  # a new attempt, which does all from this step on again
            curves[name] = [point for point in points if point.step < event.step]
    for value in event.summary.value:
        number = _number(value)
        if number is not None:
            curves.setdefault(value.tag, []).append(ScalarPoint(event.step, number, event.wall_time))


def _number(value: Any) -> float | None:
    """Return a summary's number, in the older or the newer way of writing one; None for pictures and the like."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or value.tensor.dtype not in _FLOATS or value.tensor.tensor_shape.dim:
        return None
    field, layout = _FLOATS[value.tensor.dtype]
    if listed := getattr(value.tensor, field):
        return float(listed[0])
    content = value.tensor.tensor_content
    return float(struct.unpack(layout, content)[0]) if len(content) == struct.calcsize(layout) else None
