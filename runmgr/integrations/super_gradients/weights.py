"""Weights from a checkpoint into a model whose names or layers are not quite the same: by name, or by order and shape."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from runmgr.disk import integrity
from runmgr.errors import CheckpointNotFound, InvalidInput
from runmgr.worker import loading, staging
from runmgr.worker import state as states

_PREFIX = "module."
_SHOWN = 3
_logger = logging.getLogger("runmgr.weights")


class StrictLoad(Enum):
    """How the names in a checkpoint must fit those of the model.

    ON               the same names and shapes
    OFF              what has the same name, in the same shape; further names on either side do not matter
    NO_KEY_MATCHING  names as in ON or, where they differ, the same shapes in the same order
    KEY_MATCHING     what has the same name and shape; the rest is left as it is, and named in a warning
    """

    OFF = False
    ON = True
    NO_KEY_MATCHING = "no_key_matching"
    KEY_MATCHING = "key_matching"


def read_ckpt_state_dict(ckpt_path: str | os.PathLike[str], device: Any = "cpu") -> dict[str, Any]:
    """Return what a checkpoint file holds, once every byte is checked that can be. Any rank."""
    path = Path(ckpt_path)
    if not path.exists():
        raise CheckpointNotFound(
            f"there is no file {path}" + ("; download it first" if "://" in os.fspath(ckpt_path) else ""),
            path=str(path),
        )
    if loading.can_map(path):
        integrity.check_content(path)
    content = loading.load_file(path, map_location=device)
    if not isinstance(content, Mapping):
        raise InvalidInput(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return dict(content) if "net" in content else {"net": content}


def load_checkpoint_to_model(
    net: nn.Module,
    ckpt_local_path: str | os.PathLike[str],
    load_backbone: bool = False,
    strict: StrictLoad | bool | str = StrictLoad.NO_KEY_MATCHING,
    load_weights_only: bool = False,
    load_ema_as_net: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint's weights into the model and return the checkpoint, or with `load_weights_only` its `net` alone.

    `load_ema_as_net` takes the exponential average that was saved as `ema_net`; `load_backbone` fills `net.backbone`
    only. If anything does not fit, the model is left as it was. Any rank.
    """
    content = read_ckpt_state_dict(ckpt_local_path)
    if load_ema_as_net:
        if "ema_net" not in content:
            raise InvalidInput(f"{ckpt_local_path} has no 'ema_net'; it has {sorted(content)}")
        content["net"] = _weights_of_average(content["ema_net"])
    target = states.unwrap(net)
    if load_backbone:
        backbone = getattr(target, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise InvalidInput(f"load_backbone=True, but {type(target).__name__} has no module `backbone`")
        target = backbone
    adaptive_load_state_dict(target, content, strict)
    return {"net": content["net"]} if load_weights_only else content


def adaptive_load_state_dict(net: nn.Module, state_dict: Mapping[str, Any], strict: StrictLoad | bool | str) -> None:
    """Load a state dict, or the `net` of a checkpoint, as `strict` says; an error leaves the model as it was. Any rank."""
    try:
        mode = StrictLoad(strict)
    except ValueError:
        raise InvalidInput(
            f"strict={strict!r} must be one of {', '.join(f'StrictLoad.{mode.name}' for mode in StrictLoad)}"
        ) from None
    given = _without_prefix(state_dict.get("net", state_dict))
    own = states.state_of(net)
    problems = _problems(own, given, mode)
    if problems and mode is StrictLoad.NO_KEY_MATCHING:
        states.load_module_state(net, _by_order(own, given))
        return
    if problems and mode is not StrictLoad.KEY_MATCHING:
        raise InvalidInput(f"the weights do not fit the {type(net).__name__}: {_some(problems)}")
    fitting = {key: value for key, value in given.items() if key in own and _shape(value) == _shape(own[key])}
    if own and not fitting:
        raise InvalidInput(f"none of the weights fits the {type(net).__name__}: {_some(_differences(own, given))}")
    if problems:
        _logger.warning("loaded %d of %d tensors; left as they are: %s", len(fitting), len(own), _some(problems))
    states.load_module_state(net, staging.mapping_like(given, {key: fitting.get(key, own[key]) for key in own}))


def transfer_weights(model: nn.Module, model_state_dict: Mapping[str, Any]) -> None:
    """Load what has the same name and shape, and leave the rest as it is, with a warning. Any rank."""
    adaptive_load_state_dict(model, model_state_dict, StrictLoad.KEY_MATCHING)


def _problems(own: Mapping[str, Any], given: Mapping[str, Any], mode: StrictLoad) -> list[str]:
    """Say what keeps the weights from being loaded by name."""
    if mode is StrictLoad.OFF:
        given = {key: value for key, value in given.items() if key in own}
        own = {key: own[key] for key in given}
    return _differences(own, given)


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    found = [f"the checkpoint has no {key!r}" for key in own if key not in given]
    found += [f"the model has no {key!r}" for key in given if key not in own]
    return found + [
        f"{key!r} has the shape {_shape(given[key])} in the checkpoint and {_shape(own[key])} in the model"
        for key in own
        if key in given and _shape(given[key]) != _shape(own[key])
    ]


def _by_order(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights under the model's names, the first for the first, if every shape fits."""
    if len(own) != len(given):
        raise InvalidInput(
            f"the checkpoint has {len(given)} tensors and the model {len(own)}, so their order says nothing"
        )
    for (key, mine), (other, value) in zip(own.items(), given.items(), strict=True):
        if _shape(mine) != _shape(value):
            raise InvalidInput(
                f"in order of place the checkpoint's {other!r} {_shape(value)} would become the model's {key!r} {_shape(mine)}"
            )
    return staging.mapping_like(own, dict(zip(own, given.values(), strict=True)))


def _without_prefix(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights without the `module.` of a DistributedDataParallel that was saved as it was."""
    if not given or not all(key.startswith(_PREFIX) for key in given):
        return given
    return {key.removeprefix(_PREFIX): value for key, value in given.items()}


def _weights_of_average(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights in what an ExponentialAverage saved, or super-gradients, which saves a state dict."""
    return {**saved["averages"], **saved["others"]} if saved.keys() >= {"averages", "others"} else saved


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None


def _some(problems: list[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
