"""Stand-ins for CUDA's streams, for machines without one: what is given to the other stream is done as late as it may be.

That is when somebody waits for it. So what does not wait reads or changes too early, and the average's bits are wrong. They
show the order in which things are asked for, not what a device does with it.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch

from runmgr.worker import overlap


class LateStream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, streams):
        self._streams = streams
        self._may_begin = False
        self.left = []

    def wait_stream(self, current):
        assert isinstance(current, CurrentStream)
        self._may_begin = True
        self._streams.told.append("the other stream waits")

    def give(self, work):
        assert self._may_begin, "it begins before what it reads is there"
        self.left.append(work)
        self._streams.told.append("update")

    def leave(self):
        self._may_begin = False


class CurrentStream:
    """In the place of what torch.cuda.current_stream returns."""

    def __init__(self, streams):
        self._streams = streams

    def wait_stream(self, other):
        left, other.left = other.left, []
        for work in left:
            work()
        self._streams.told.append("the current stream waits")


class Streams:
    """All of them, and what they were told, in its order."""

    def __init__(self, monkeypatch):
        self.told = []
        self.recorded = set()
        entered, plain = [], overlap.Pairing

        @contextmanager
        def enter(stream):
            entered.append(stream)
            yield
            entered.pop().leave()

        class LatePairing(overlap.Pairing):
            def apply(self, *change):
                if entered:
                    entered[-1].give(lambda: plain.apply(self, *change))
                else:
                    super().apply(*change)

        def record(tensor, stream):
            assert isinstance(stream, LateStream)
            self.recorded.add(tensor.untyped_storage().data_ptr())

        current = CurrentStream(self)
        monkeypatch.setattr(overlap, "_streams", {})
        monkeypatch.setattr(overlap, "_is_on_one_gpu", lambda part, view: True)
        monkeypatch.setattr(overlap, "Pairing", LatePairing)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: LateStream(self))
        monkeypatch.setattr(torch.cuda, "stream", enter)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch.Tensor, "record_stream", record)

    @property
    def left(self):
        return sum(len(stream.left) for stream in overlap._streams.values())
