"""State dicts from modules, optimizers and the rest of a training, and back; random-number states of this process."""

from __future__ import annotations

import base64
import dataclasses
import enum
import os
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from runmgr.disk import provenance
from runmgr.errors import InvalidInput

RESERVED_KEYS = ("epoch", "step", "metrics", "run_id", "rng")
_LEAVES = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module, without DDP, DataParallel or torch.compile around it."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def module_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of the bare module, with the keys that it has before any wrapping or compiling."""
    found = {}
    for key, tensor in unwrap(module).state_dict().items():
        if type(tensor).__name__ == "DTensor":
            raise InvalidInput(
                f"{key!r} is a sharded DTensor; runmgr saves whole models so far, so gather it first "
                f"(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
            )
        found[key.replace("_orig_mod.", "")] = tensor
    return found


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `module_state` gave into the bare module, strictly."""
    bare = unwrap(module)
    own = {key.replace("_orig_mod.", ""): key for key in bare.state_dict()}
    bare.load_state_dict({own.get(key, key): value for key, value in state.items()})


def check_keys(state: Mapping[str, Any]) -> None:
    """Refuse a state whose keys clash with the ones that runmgr adds."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise InvalidInput("state must be a dict with string keys, such as {'net': model, 'optimizer': optimizer}")
    if clash := sorted(set(state) & set(RESERVED_KEYS)):
        raise InvalidInput(
            f"state has the keys {clash}, which runmgr adds itself ({', '.join(RESERVED_KEYS)}); rename them, and give "
            f"epoch, step and metrics as arguments of save()"
        )


def gather(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `state` is worth saving: state dicts of what has one, plain values as they are.

    The result holds only what `torch.load(weights_only=True)` accepts; anything else is an error naming its key path.
    """
    return {key: loadable(_state_of(value), key) for key, value in state.items()}


def _state_of(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return module_state(value)
    if callable(getattr(value, "state_dict", None)):
        return value.state_dict()
    return value


def loadable(value: Any, where: str) -> Any:
    """Return `value` with numpy scalars, paths, enums and dataclasses made plain; raise for what cannot be loaded."""
    if isinstance(value, torch.Tensor) or type(value) in _LEAVES:
        return value
    if isinstance(value, Mapping):
        items = {_key(key, where): loadable(item, f"{where}.{key}") for key, item in value.items()}
        return type(value)(items) if isinstance(value, (OrderedDict, Counter)) else items
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(loadable(item, f"{where}[{index}]") for index, item in enumerate(value))
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    if isinstance(value, (str, int, float, enum.Enum, os.PathLike)) or dataclasses.is_dataclass(value):
        return provenance.plain(value)
    raise InvalidInput(
        f"state[{where!r}] is a {type(value).__module__}.{type(value).__qualname__}, which torch.load(weights_only=True) "
        f"would refuse to load. Give an object with state_dict() and load_state_dict(), a tensor, or plain values."
    )


def _key(key: Any, where: str) -> Any:
    if type(key) in {bool, int, float, str}:
        return key
    if isinstance(key, (int, str, enum.Enum)):
        return provenance.plain(key)
    raise InvalidInput(f"state[{where!r}] has the key {key!r}; only strings and numbers can be saved as keys")


def restore(state: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Load the saved parts back into the objects of `state`; returns the plain values, which have no place to go.

    Raises InvalidInput when `saved` lacks a key of `state`; nothing is loaded then.
    """
    if missing := [key for key in state if key not in saved]:
        raise InvalidInput(
            f"the checkpoint has no {missing}; it holds {sorted(set(saved) - set(RESERVED_KEYS))}. Leave out of `state` "
            f"what it does not have."
        )
    values = {}
    for key, target in state.items():
        if isinstance(target, nn.Module):
            load_module_state(target, saved[key])
        elif callable(getattr(target, "load_state_dict", None)):
            target.load_state_dict(saved[key])
        else:
            values[key] = saved[key]
    return values


def rng_state() -> dict[str, str]:
    """Return this process's random-number states as text: Python, torch, numpy and the current CUDA device if in use."""
    version, words, gauss = random.getstate()
    states = {
        "python": ",".join(map(str, (version, *words, "" if gauss is None else repr(gauss)))),
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    if (numpy := sys.modules.get("numpy")) is not None:
        name, words, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = ",".join(map(str, (name, *words.tolist(), position, has_gauss, repr(float(cached)))))
    return states


def restore_rng(states: Mapping[str, str]) -> None:
    """Continue the random numbers where `rng_state` was taken."""
    version, *words, gauss = states["python"].split(",")
    random.setstate((int(version), tuple(map(int, words)), float(gauss) if gauss else None))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))
    if "numpy" in states:
        import numpy as np

        name, *words, position, has_gauss, cached = states["numpy"].split(",")
        state = (name, np.array(words, dtype=np.uint32), int(position), int(has_gauss), float(cached))
        np.random.set_state(state)  # noqa: NPY002  # the global generator is what user code draws from


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
