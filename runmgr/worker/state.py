"""State dicts from modules, optimizers and the rest of a training, and back; random-number states of this process."""

from __future__ import annotations

import base64
import dataclasses
import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runmgr.errors import InvalidInput
from runmgr.worker.staging import OwnCopies, tensors_in

if TYPE_CHECKING:
    import logging

RESERVED_KEYS = ("epoch", "step", "metrics", "run_id", "rng")
_PER_RANK = "per_rank"


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


def module_state(module: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """Return the state dict of the bare module, with the keys that it has before any wrapping or compiling.

    Its `_metadata`, the versions of the module's parts, is torch's, under keys that are cleaned likewise.
    """
    bare = unwrap(module)
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in bare.modules()):
        raise InvalidInput(
            "the model is wrapped in FullyShardedDataParallel (FSDP 1), which runmgr does not gather; use "
            "torch.distributed.fsdp.fully_shard"
        )
    state = bare.state_dict()
    found = OrderedDict((_clean(key), tensor) for key, tensor in state.items())
    if (metadata := _metadata_of(state)) is not None:  # a compiled part comes after its wrapper, and its version stays
        _set_metadata(found, {_clean_prefix(prefix): versions for prefix, versions in metadata.items()})
    return found


def _clean(key: str) -> str:
    return key.replace("_orig_mod.", "")


def _clean_prefix(prefix: str) -> str:
    return _clean(f"{prefix}.")[:-1]


def _metadata_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    return getattr(state, "_metadata", None)


def _set_metadata(state: OrderedDict[str, Any], metadata: Mapping[str, Any]) -> None:
    state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]  # noqa: SLF001  # torch's own name for it


def state_of(value: Any) -> Any:
    """Return the state of one value of `state`: the state dict of what has one, a plain value as it is."""
    if isinstance(value, nn.Module):
        return module_state(value)
    if callable(getattr(value, "state_dict", None)):
        return value.state_dict()
    return value


def is_sharded(value: Any) -> bool:
    """Whether this is a DTensor; nothing is imported to find out."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's own shard of a DTensor, whose memory it shares; another tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def with_local_part(like: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is sharded as `like` is, of which this rank's shard is `local`; else `local` itself."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    placed: Any = like
    return DTensor.from_local(
        local, placed.device_mesh, placed.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def beside(like: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return what `with_local_part` does, but on the shard's own device, which need not be the one that shards travel on."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    make: Any = DTensor  # as torch's FSDP2 makes one of a shard
    placed: Any = like
    return make(local, placed._spec, requires_grad=False)  # type: ignore[no-any-return]  # noqa: SLF001


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters, which are no buffers, under the keys of `module_state`."""
    return {_clean(name): parameter for name, parameter in unwrap(module).named_parameters(remove_duplicate=False)}


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
    names = {_clean(key): key for key in own}
    found = {names.get(key, key): value for key, value in state.items()}
    parts = OrderedDict((key, sharded_like(own.get(key), value)) for key, value in found.items())
    for key, value in parts.items():
        if not isinstance(
            value, torch.Tensor
        ):  # extra state, which the module keeps as it is, while `state` is a file's
            parts[key] = OwnCopies().copy(value)
    if (metadata := _metadata_of(state)) is not None:
        saved = {prefix: metadata.get(_clean_prefix(prefix)) for prefix in _metadata_of(own) or ()}
        _set_metadata(parts, {prefix: versions for prefix, versions in saved.items() if versions is not None})
    bare.load_state_dict(parts)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], copies: OwnCopies) -> None:
    """Load a full state, a file's pages, into an optimizer, whose parameters may lie in shards: then only these are copied."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=False))  # load_state_dict says it better when they do not match

    def part(like: Any, value: Any) -> Any:
        found = sharded_like(like, value)
        return found if is_sharded(found) else copies.copy(found)

    def parts(number: Any, entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return copies.copy(entry)
        return {key: part(own.get(number), value) for key, value in entry.items()}

    rest = {key: value for key, value in state.items() if key != "state"}
    found = {number: parts(number, entry) for number, entry in state["state"].items()}
    optimizer.load_state_dict({**copies.copy(rest), "state": found})


def sharded_like(own: Any, full: Any) -> Any:
    """Return this rank's part of a full tensor where `own` is a DTensor of its shape; anything else as it is."""
    if not (is_sharded(own) and isinstance(full, torch.Tensor) and full.shape == own.shape):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = distribute_tensor(full.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    local = whole.to_local().clone()  # not a view that would keep the whole tensor in memory
    if own.device != local.device:  # FSDP2 offloads its shards to the CPU
        return beside(own, local.to(own.device))
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


def expected_size(state: Mapping[str, Any]) -> tuple[int, torch.device | None]:
    """Return how many bytes of tensors `save(block=False)` will copy, and the GPU that some lie on, if any do.

    Sharded tensors are not copied but made whole, which is a copy already. An optimizer makes its state at its first step;
    until then two tensors a parameter are expected from those with `betas`, one from those with `momentum`.
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
                parameters = [parameter for group in value.param_groups for parameter in group["params"]]
                expected += copies * _size_bytes_of_copies(parameters)[0]
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
    found, gpu = _size_bytes_of_copies(tensors)
    return found + expected, gpu


def _size_bytes_of_copies(values: Iterable[Any]) -> tuple[int, torch.device | None]:
    tensors = [
        value for value in values
        if isinstance(value, torch.Tensor) and value.layout == torch.strided
        and not is_sharded(value) and not nn.parameter.is_lazy(value)
    ]  # fmt: skip
    return sum(tensor.nbytes + 64 for tensor in tensors), next((one.device for one in tensors if one.is_cuda), None)


def restore(state: Mapping[str, Any], saved: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """Load the saved parts back into the objects of `state`; returns the plain values, which have no place to go.

    `saved` may be mapped from a file: whatever is kept of it is copied. Raises InvalidInput when it lacks a key of
    `state`; nothing is loaded then.
    """
    _check_has(saved, state)
    for key, target in state.items():
        _check_mark(key, target, saved[key])
    values, copies = {}, OwnCopies()
    for key, target in state.items():
        part, owner = saved[key], target
        if isinstance(target, PerRank):
            if rank >= len(part[_PER_RANK]):
                continue
            part, owner = part[_PER_RANK][rank], target.value
        if isinstance(owner, nn.Module):
            load_module_state(owner, part)
            continue
        if getattr(owner, "keeps_copies", False):  # an average, which takes its rank's share of the file
            owner.load_state_dict(part)
            continue
        if isinstance(owner, torch.optim.Optimizer):
            load_optimizer_state(owner, part, copies)
            continue
        part = copies.copy(part)
        if callable(getattr(owner, "load_state_dict", None)):
            owner.load_state_dict(part)
        else:
            values[key] = part
    return values


def _check_has(saved: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    if not (missing := [key for key in state if key not in saved]):
        return
    if saved and all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise InvalidInput(
            f"the checkpoint has no {missing}: it is a model's bare state dict, {next(iter(saved))!r} and so on. Begin "
            f"without it, and give it to the model in a run that is fresh: model.load_state_dict(run.load(path))"
        )
    raise InvalidInput(
        f"the checkpoint has no {missing}; it holds {sorted(set(saved) - set(RESERVED_KEYS))}. Leave out of `state` "
        f"what it does not have."
    )


def joined_per_rank(parts: list[Any]) -> dict[str, list[Any]]:
    """Return what a checkpoint holds for a value that is `per_rank`."""
    return {_PER_RANK: parts}


def is_joined_per_rank(saved: Any) -> bool:
    """Whether `joined_per_rank` made this."""
    return isinstance(saved, Mapping) and saved.keys() == {_PER_RANK} and isinstance(saved[_PER_RANK], list)


def _check_mark(key: str, target: Any, saved: Any) -> None:
    """Refuse what is marked per_rank on one side only."""
    if isinstance(target, PerRank) and not is_joined_per_rank(saved):
        raise InvalidInput(
            f"state[{key!r}] is marked per_rank, but the checkpoint holds it once for all ranks; restore it without "
            f"per_rank(), and mark it for the saves after that"
        )
    if not isinstance(target, PerRank) and is_joined_per_rank(saved):
        raise InvalidInput(
            f"the checkpoint holds {key!r} for each of {len(saved[_PER_RANK])} ranks, because it was marked per_rank; "
            f"restore it as per_rank(…), and save it without the mark after that if all ranks are to share one"
        )


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


def restore_rng(of_ranks: Sequence[Mapping[str, str]], rank: int, logger: logging.Logger) -> None:
    """Continue this rank's random numbers where `rng_state` was taken; an empty list is of a file that has none."""
    if rank >= len(of_ranks):
        if of_ranks:
            logger.warning(
                "the checkpoint has random-number states of %d ranks, none for this one; it goes on with its own",
                len(of_ranks),
            )
        return
    states = of_ranks[rank]
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
