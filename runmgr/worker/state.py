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
from runmgr.worker.staging import map_tensors, tensors_in

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
    found = _own_state(module)
    for key, tensor in found.items():
        if _is_sharded(tensor):
            raise InvalidInput(
                f"{key!r} is a sharded DTensor, which runmgr saves and restores but does not average yet; average "
                f"a whole model"
            )
    return found


def _own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    bare = unwrap(module)
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in bare.modules()):
        raise InvalidInput(
            "the model is wrapped in FullyShardedDataParallel (FSDP 1), which runmgr does not gather; use "
            "torch.distributed.fsdp.fully_shard"
        )
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in bare.state_dict().items()}


def _is_sharded(value: Any) -> bool:
    """Whether this is a DTensor; nothing is imported to find out."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def is_sharded(state: Mapping[str, Any]) -> bool:
    """Whether a module of `state` lies in shards, so that every rank must `gather`."""
    return any(
        isinstance(value, nn.Module) and any(_is_sharded(parameter) for parameter in value.parameters())
        for value in state.values()
    )


@dataclasses.dataclass(frozen=True)
class PerRank:
    """What each rank has of its own; see `per_rank`."""

    value: Any


def per_rank(value: Any) -> PerRank:
    """Mark an object of `state` as this rank's own, such as a data loader: each rank saves its, and gets its back.

    Anything with `state_dict()` and `load_state_dict()`, or plain values. Small: it travels between the ranks. A rank
    that the checkpoint does not know, because there were fewer, keeps what it has.
    """
    return PerRank(value)


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `module_state` gave into the bare module, strictly."""
    bare = unwrap(module)
    own = bare.state_dict()
    names = {key.replace("_orig_mod.", ""): key for key in own}
    found = {names.get(key, key): value for key, value in state.items()}
    bare.load_state_dict({key: _sharded_like(own.get(key), value) for key, value in found.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a full state into an optimizer, whose parameters may lie in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=False))  # load_state_dict says it better when they do not match

    def shard(number: Any, entry: Any) -> Any:
        like = own.get(number)
        if not isinstance(entry, Mapping) or not _is_sharded(like):
            return entry
        return {key: _sharded_like(like, value) for key, value in entry.items()}

    parts = {number: shard(number, entry) for number, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _sharded_like(own: Any, full: Any) -> Any:
    """Return this rank's part of a full tensor where `own` is a DTensor of its shape; anything else as it is."""
    if not (_is_sharded(own) and isinstance(full, torch.Tensor) and full.shape == own.shape):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = distribute_tensor(full.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    local = whole.to_local().clone()  # not a view that would keep the whole tensor in memory
    return DTensor.from_local(
        local, own.device_mesh, own.placements, run_check=False, shape=full.shape, stride=whole.stride()
    )


def check_keys(state: Mapping[str, Any]) -> None:
    """Refuse a state whose keys clash with the ones that runmgr adds."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise InvalidInput("state must be a dict with string keys, such as {'net': model, 'optimizer': optimizer}")
    if clash := sorted(set(state) & set(RESERVED_KEYS)):
        raise InvalidInput(
            f"state has the keys {clash}, which runmgr adds itself ({', '.join(RESERVED_KEYS)}); rename them, and give "
            f"epoch, step and metrics as arguments of save()"
        )


def gather(state: Mapping[str, Any], *, is_main: bool = True) -> dict[str, Any]:
    """Return what `state` is worth saving: full state dicts of what has one, plain values as they are.

    Rank 0 alone, but every rank where `is_sharded`: a sharded tensor is made whole, one at a time, and kept on rank 0's
    CPU only. The result holds only what `torch.load(weights_only=True)` accepts; anything else is an error naming its
    key path.
    """
    whole = {
        key: map_tensors(_state_of(value), lambda tensor: _whole(tensor, is_main=is_main))
        for key, value in state.items()
    }
    return {key: loadable(value, key) for key, value in whole.items()} if is_main else {}


def _whole(tensor: torch.Tensor, *, is_main: bool) -> torch.Tensor | None:
    if not _is_sharded(tensor):
        return tensor
    full = tensor.full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if is_main else None


def expected_size(state: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how many bytes of tensors a save of `state` will hold, and whether some lie on a GPU.

    An optimizer makes its state at its first step; until then two tensors a parameter are expected from those with
    `betas`, one from those with `momentum`.
    """
    tensors: list[torch.Tensor] = []
    expected = 0
    for value in state.values():
        if isinstance(value, nn.Module):
            tensors += value.state_dict().values()
        elif isinstance(value, torch.optim.Optimizer):
            tensors += tensors_in(value.state_dict())
            if not value.state:
                copies = 2 if "betas" in value.defaults else int(bool(value.defaults.get("momentum")))
                parameters = (parameter for group in value.param_groups for parameter in group["params"])
                expected += copies * sum(parameter.nbytes + 64 for parameter in parameters)
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
    found = sum(tensor.nbytes + 64 for tensor in tensors if tensor.layout == torch.strided)
    return found + expected, any(tensor.is_cuda for tensor in tensors)


def _state_of(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return _own_state(value)
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


def restore(state: Mapping[str, Any], saved: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """Load the saved parts back into the objects of `state`; returns the plain values, which have no place to go.

    `saved` may be mapped from a file: whatever is kept of it is copied. Raises InvalidInput when it lacks a key of
    `state`; nothing is loaded then.
    """
    if missing := [key for key in state if key not in saved]:
        raise InvalidInput(
            f"the checkpoint has no {missing}; it holds {sorted(set(saved) - set(RESERVED_KEYS))}. Leave out of `state` "
            f"what it does not have."
        )
    values = {}
    for key, target in state.items():
        part, owner = saved[key], target
        if isinstance(target, PerRank):
            if rank >= len(part["per_rank"]):
                continue
            part, owner = part["per_rank"][rank], target.value
        if isinstance(owner, nn.Module):
            load_module_state(owner, part)
            continue
        part = map_tensors(part, torch.clone)
        if isinstance(owner, torch.optim.Optimizer):
            load_optimizer_state(owner, part)
        elif callable(getattr(owner, "load_state_dict", None)):
            owner.load_state_dict(part)
        else:
            values[key] = part
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
