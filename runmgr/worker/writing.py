"""Plain content → one whole, durable file. The one place that calls torch.save."""

from __future__ import annotations

import base64
import io
import pickle
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

import torch

from runmgr.disk import atomic, integrity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


def write_file(content: Mapping[str, Any], path: Path, on_written: Callable[[int], None] = lambda _: None) -> None:
    """Write `content` to `path`, which appears whole, durable and read-only."""
    with atomic.new_file(path, mode=0o444) as descriptor:
        _write(content, integrity.RecordStream(descriptor, on_written))


def write_filled(
    content: Mapping[str, Any], path: Path, pieces: Iterator[memoryview], before_it_appears: Callable[[], object]
) -> None:
    """Write `content` as `write_file` does, with `pieces`, one after another, in place of its tensors' bytes.

    The memory of the tensors is not looked at; it may be one stretch for all of them. `before_it_appears` may still refuse.
    """
    with atomic.new_file(path, mode=0o444) as descriptor:
        with torch.serialization.skip_data():
            _write(content, integrity.FilledStream(descriptor, pieces))
        before_it_appears()


def _write(content: Mapping[str, Any], stream: integrity.RecordStream) -> None:
    with _WithoutCrcs() as pickling:
        try:
            torch.save(content, cast("BinaryIO", stream), pickle_module=pickling)
        except RuntimeError as error:  # torch's own, when the disk refused the end of the file
            raise stream.error or error from None
    stream.fill_crcs()


class _WithoutCrcs:
    """Lets one torch.save leave the CRCs to our stream. It stands for the pickle module in that call.

    In older versions the option is the whole process's, and other threads may be saving; torch.save reads it once, and asks
    for the pickler right after that.
    """

    __name__ = "pickle"

    def __enter__(self) -> Self:
        self._before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        return self

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._before)

    @property
    def Pickler(self) -> type[pickle.Pickler]:  # noqa: N802  # the module's own name for it
        torch.serialization.set_crc32_options(self._before)
        return pickle.Pickler


def packed(value: Any) -> str:
    """Return plain values and small tensors as text, to send them between ranks."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue()).decode()
