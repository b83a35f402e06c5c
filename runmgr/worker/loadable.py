"""Values as `torch.load(weights_only=True)` will give them back, or an error that names where the value lies.

What that accepts is torch's own table (`torch/_weights_only_unpickler.py`), which the test of this file holds this one to.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from runmgr.errors import InvalidInput
from runmgr.worker.staging import mapping_like, tensors_in
from runmgr.worker.state import PerRank, is_sharded

_LEAVES = {bool, float, complex, str, type(None), torch.dtype, torch.device, torch.Size}
_KEYS = (bool, int, float, str)
_SCALARS = (bool, int, float, complex, str, bytes)
_LAYOUTS = {
    torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
}  # fmt: skip
_LONGEST_INTEGER_BITS = 2039  # of protocol 2, which torch.save writes, weights_only loading reads at most 255 bytes
_NUMPY_KINDS = "biufcUS"  # its dates and durations would become bare numbers


def loadable(value: Any, where: str) -> Any:  # noqa: PLR0911  # one table of types
    """Return `value` made of what can be loaded again, or raise InvalidInput, which calls it `where`.

    Made plain: dataclasses become dicts of their fields; named tuples, tuples; mappings other than OrderedDict and Counter,
    dicts; enums, their values; paths, text; numpy's scalars, Python's. Tensors lose their gradients and attributes, and
    sharded ones stay, to be made whole. Every other type is refused: deque, frozenset, arrays, modules inside containers.
    """
    if isinstance(value, torch.Tensor):
        return _tensor(value, where)
    if type(value) in _LEAVES:
        return value
    if isinstance(value, Mapping):
        return _mapping(value, where)
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(loadable(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, set):
        return _set(value, where)
    if isinstance(value, enum.Enum):
        return loadable(value.value, where)
    if isinstance(value, os.PathLike):
        return loadable(os.fspath(value), where)
    if isinstance(value, PerRank):
        raise InvalidInput(
            f"state[{where!r}] is marked per_rank, which only works at the top level of state; move it there"
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return loadable({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    return _scalar(value, where)


def _tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    if is_sharded(tensor):
        return tensor
    if type(tensor) not in {torch.Tensor, nn.Parameter} or tensor.layout not in _LAYOUTS:
        shown = _name(tensor) if type(tensor) is not torch.Tensor else f"tensor of layout {tensor.layout}"
        raise InvalidInput(
            f"state[{where!r}] is a {shown}, which torch.load(weights_only=True) would refuse to load; save an ordinary "
            f"tensor, such as x.as_subclass(torch.Tensor) or x.to_dense()"
        )
    if tensor.is_meta:
        raise InvalidInput(f"state[{where!r}] is a tensor on the meta device, which has nothing to save")
    return tensor.detach()


def _mapping(value: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    items = {_key(key, where): loadable(item, f"{where}.{key}") for key, item in value.items()}
    if len(items) != len(value):
        raise InvalidInput(f"state[{where!r}] has keys that are equal once they are plain: {list(value)!r:.200}")
    found = mapping_like(value, items)
    if (metadata := getattr(found, "_metadata", None)) is not None:
        found._metadata = loadable(metadata, f"{where}._metadata")  # type: ignore[attr-defined]  # noqa: SLF001  # torch's own
    return found


def _key(key: Any, where: str) -> Any:
    if type(key) is str:  # as nearly all are, and there are several for each tensor of an optimizer
        return key
    while isinstance(key, enum.Enum):
        key = key.value
    plain = _plain_scalar(key)
    if type(plain) not in _KEYS:
        raise InvalidInput(f"state[{where!r}] has the key {key!r}; only strings and numbers can be saved as keys")
    return _fitting(plain, where)


def _set(value: set[Any], where: str) -> set[Any]:
    items = [loadable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    try:
        found = set(items)
    except TypeError as error:  # such as a frozen dataclass, which is a dict by now
        raise InvalidInput(f"state[{where!r}] is a set that cannot be made plain: {error}; save a list") from None
    if len(found) != len(value) or any(True for _ in tensors_in(items)):
        raise InvalidInput(f"state[{where!r}] is a set of more than plain values; save a list")
    return found


def _scalar(value: Any, where: str) -> Any:
    plain = _plain_scalar(value)
    if plain is None:
        raise InvalidInput(
            f"state[{where!r}] is a {_name(value)}, which torch.load(weights_only=True) would refuse to load. At the top "
            f"level of state give an object with state_dict() and load_state_dict(); elsewhere tensors, numbers, text, and "
            f"dicts, lists, tuples and sets of them."
        )
    return _fitting(plain, where)


def _plain_scalar(value: Any) -> bool | float | complex | str | bytes | None:
    """Return Python's own scalar for `value`, None for what is not one."""
    if type(value) in _SCALARS:
        return value  # type: ignore[no-any-return]
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        item = value.item() if getattr(value.dtype, "kind", "") in _NUMPY_KINDS else None
        return item if type(item) in _SCALARS else None  # a long double stays what it is
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    return None


def _fitting(value: Any, where: str) -> Any:
    if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER_BITS:
        raise InvalidInput(
            f"state[{where!r}] holds a whole number of {value.bit_length()} bits; torch.load(weights_only=True) reads "
            f"{_LONGEST_INTEGER_BITS} at most. Save it as text."
        )
    if value == b"":
        raise InvalidInput(f"state[{where!r}] is empty bytes, which torch.load(weights_only=True) would refuse to load")
    return value


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
