"""Updates of averages on a CUDA stream of their own, beside the training's next forward and backward pass.

There is one such stream for each device. Who reads what an update writes, or writes what it reads, calls `join` before: the
device waits then, not the host. An optimizer does so at each step, and only its parameters are updated there. Buffers are not:
a forward pass already changes them.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from runmgr.errors import InvalidInput
from runmgr.worker.fusing import Pairing
from runmgr.worker.state import parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from runmgr.worker.source import Source

_streams: dict[torch.device, torch.cuda.Stream] = {}


def join(*_: object) -> None:
    """Let what the current streams are given from now on come after all updates. It takes what a hook is called with."""
    if _streams:
        _join()


@torch._disable_dynamo  # type: ignore[attr-defined]  # noqa: SLF001  # in a compiled optimizer step nothing would wait
def _join() -> None:
    for device, stream in _streams.items():
        torch.cuda.current_stream(device).wait_stream(stream)


class Overlap:
    """What may be updated beside the training: the parameters that one optimizer changes, and nobody else.

    The optimizer's step and the model's `load_state_dict` wait for the updates as long as this object lives.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        step = getattr(type(optimizer), "step", None)
        if not getattr(step, "hooked", False):  # torch's mark of a step that calls hooks
            raise InvalidInput(
                f"overlap_with must be the torch.optim.Optimizer that changes the model's parameters, whose step waits for the "
                f"update, not a {type(optimizer).__name__}, whose step calls no hooks"
            )
        self._model = model
        self._optimizer = weakref.ref(optimizer)
        before_load = model.register_load_state_dict_pre_hook(join)  # type: ignore[no-untyped-call]
        for handle in (optimizer.register_step_pre_hook(join), before_load):
            weakref.finalize(self, handle.remove)

    def paired(self, source: Source, parts: list[Tensor], views: list[Tensor]) -> OverlappingPairing:
        """Pair this rank's parts of an average with those of the model, for as long as the model's memory stays."""
        join()  # what was beside until now need not be so any more
        held = self._held() if source.writes_through else set()
        groups: dict[torch.device | None, tuple[list[Tensor], list[Tensor]]] = {}
        for piece, part, view in zip(source.layout.mine, parts, views, strict=True):
            is_beside = source.layout.keys[piece.tensor] in held and _is_on_one_gpu(part, view)
            group = groups.setdefault(view.device if is_beside else None, ([], []))
            group[0].append(part)
            group[1].append(view)
            if is_beside:  # should one of them be freed, its memory is not used again before the update has ended
                part.record_stream(_stream(view.device))
                view.record_stream(_stream(view.device))
        return OverlappingPairing(self._optimizer, {device: Pairing(*group) for device, group in groups.items()})

    def _held(self) -> set[str]:
        """Return the keys of the parameters that the optimizer changes."""
        optimizer = self._optimizer()
        groups = optimizer.param_groups if optimizer is not None else []
        held = {id(parameter) for group in groups for parameter in group["params"]}
        return {key for key, parameter in parameters_of(self._model).items() if id(parameter) in held}


class OverlappingPairing:
    """A `Pairing` whose parts run on the streams of their devices; those of None on the current one."""

    def __init__(
        self, optimizer: weakref.ref[torch.optim.Optimizer], pairings: dict[torch.device | None, Pairing]
    ) -> None:
        self._optimizer = optimizer
        self._pairings = pairings

    def apply(
        self, change: Callable[[list[Tensor], list[Tensor]], object], one: Callable[[Tensor, Tensor], object]
    ) -> None:
        """Change the targets by the sources, as `Pairing.apply` does."""
        has_optimizer = self._optimizer() is not None
        if not has_optimizer:  # then another one may change the parameters, which does not wait
            join()
        for device, pairing in self._pairings.items():
            if device is None or not has_optimizer:
                pairing.apply(change, one)
            else:
                with _beside(device):
                    pairing.apply(change, one)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Give the block's work to the device's other stream, after all that the current one has been given."""
    _stream(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        yield


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def _is_on_one_gpu(part: Tensor, view: Tensor) -> bool:
    """Whether both lie there; an average that its device had no room for lies in host memory."""
    return view.is_cuda and part.device == view.device
