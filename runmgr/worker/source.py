"""The tensors of a model that are averaged, as this rank sees its part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from runmgr.errors import InvalidInput
from runmgr.worker import agreement
from runmgr.worker.fusing import copy_all
from runmgr.worker.sharding import Layout, flat_in_order_of, is_dense
from runmgr.worker.staging import map_tensors
from runmgr.worker.state import beside, is_sharded, local_part, module_state, parameters_of, sharded_like

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    Weights = dict[str, Tensor]


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class Source:
    """Flat views of this rank's part of a model, made once and again whenever the model's memory has moved."""

    def __init__(self, model: nn.Module, dtype_of: Callable[[Tensor], torch.dtype]) -> None:
        self.model = model
        own = module_state(model)
        averaged = {key: tensor for key, tensor in own.items() if is_averaged(tensor)}
        self.dtypes = {key: dtype_of(tensor) for key, tensor in averaged.items()}
        self.ranks = agreement.current_ranks()
        self.layout = Layout(averaged, parameters_of(model), self.dtypes, self.ranks)
        self.outlines = {key: _outline(tensor) for key, tensor in averaged.items()}
        self._look(own)

    @property
    def writes_through(self) -> bool:
        """Whether the state dict's tensors are the model's own memory, so that writing to them changes the model."""
        return self._places is not None and all(isinstance(value, torch.Tensor) for value in self._others.values())

    def views(self) -> list[Tensor]:
        """Return this rank's parts of the model's tensors: the same list for as long as nothing has moved."""
        if self._places is None or _addresses(self._places) != self._addresses:
            self._look(module_state(self.model))
        return self._views

    def others(self) -> Weights:
        """Return what has no average, such as integer buffers, copied; on ranks above 0 nothing, since rank 0's count."""
        if not self.ranks.is_main:
            return {}
        self.views()
        return {key: map_tensors(value, _copied) for key, value in self._others.items()}

    def parts_of(self, saved: Mapping[str, Tensor]) -> list[Tensor]:
        """Return this rank's part of whole tensors, such as a file's: where it can be, views of their memory."""
        own = module_state(self.model)
        found = {key: local_part(sharded_like(own[key], saved[key])) for key in self.layout.keys}
        flats = [flat_in_order_of(local_part(own[key]), tensor) for key, tensor in found.items()]
        return [flats[piece.tensor][piece.start : piece.stop] for piece in self.layout.mine]

    def _look(self, own: Mapping[str, Tensor]) -> None:
        averaged = {key: tensor for key, tensor in own.items() if is_averaged(tensor)}
        check_same(self.outlines, {key: _outline(tensor) for key, tensor in averaged.items()}, "the model")
        self._views = self.layout.views(averaged)
        self._others = {key: value for key, value in own.items() if key not in averaged}
        self._places = _places(self.model, own)
        self._addresses = _addresses(self._places or [])


def is_averaged(value: Any) -> bool:
    """Whether it has an average; of others the newest member's counts."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def check_same(known: Mapping[str, Any], found: Mapping[str, Any], whose: str) -> None:
    """Raise InvalidInput, listing the keys, unless both have the same keys with the same shapes."""
    wrong = {
        "missing": sorted(known.keys() - found.keys()),
        "not known": sorted(found.keys() - known.keys()),
        "of another shape": sorted(key for key in known.keys() & found.keys() if known[key] != found[key]),
    }
    if any(wrong.values()):
        told = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in wrong.items() if keys)
        raise InvalidInput(f"{whose} has other tensors than the average is of ({told}); make a new average for it")


def set_aside(tensor: Tensor) -> Tensor:
    """Copy this rank's part of a tensor, to host memory where its device has no room."""
    local = local_part(tensor).detach()
    try:
        return beside(tensor, local.clone())
    except torch.OutOfMemoryError:
        return beside(tensor, local.cpu())


@torch.no_grad()
def write_into(own: Weights, values: Mapping[str, Any]) -> None:
    """Copy the values into the tensors of a state dict, which are the model's own."""
    keys = [key for key in own if key in values and own[key].numel()]
    copy_all([local_part(own[key]).detach() for key in keys], [local_part(values[key]) for key in keys])


def _outline(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(local_part(tensor).shape)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _places(model: nn.Module, own: Mapping[str, Tensor]) -> list[tuple[dict[str, Any], str]] | None:
    """Say in which dicts of the model's parts its tensors lie; None where looking there would not tell that one moved."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for prefix, part in model.named_modules(remove_duplicate=False):
        for place in (part._parameters, part._buffers):  # noqa: SLF001  # where a module keeps its tensors
            for name in place:
                found[f"{prefix}.{name}".removeprefix(".").replace("_orig_mod.", "")] = place, name
    tensors = {key: value for key, value in own.items() if isinstance(value, torch.Tensor)}
    if not tensors.keys() <= found.keys() or not all(is_dense(local_part(value)) for value in tensors.values()):
        return None
    places = [found[key] for key in tensors]
    return places if _addresses(places) == [_bare(tensor).data_ptr() for tensor in tensors.values()] else None


def _addresses(places: list[tuple[dict[str, Any], str]]) -> list[int] | None:
    try:
        tensors = [place[name] for place, name in places]
        return [(tensor if type(tensor) in _PLAIN else _bare(tensor)).data_ptr() for tensor in tensors]
    except (KeyError, AttributeError):  # it is no longer there, or None
        return None


def _bare(tensor: Any) -> Tensor:
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[no-any-return]  # noqa: SLF001  # to_local() is slow
