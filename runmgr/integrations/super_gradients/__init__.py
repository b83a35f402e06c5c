"""super-gradients' names for its experiment management, over runmgr: change the import, keep the call.

::

    from runmgr.integrations.super_gradients import get_checkpoints_dir_path, get_latest_run_id

Names are loaded on first use, so that looking things up never imports torch. `docs/from-super-gradients.md` says what
each became.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runmgr.disk.catalog import get_checkpoints_dir_path, get_latest_run_id
    from runmgr.integrations.super_gradients.averages import (
        EMA_DECAY_FUNCTIONS,
        ConstantDecay,
        ExpDecay,
        ModelEMA,
        ModelWeightAveraging,
        ThresholdDecay,
    )
    from runmgr.integrations.super_gradients.directories import (
        generate_run_id,
        get_ckpt_local_path,
        get_experiment_dir_path,
        get_project_checkpoints_dir_path,
        is_run_dir,
        validate_run_id,
    )
    from runmgr.integrations.super_gradients.logger import BaseSGLogger
    from runmgr.integrations.super_gradients.options import start_options
    from runmgr.integrations.super_gradients.ranks import (
        broadcast_from_master,
        execute_and_distribute_from_master,
        get_world_size,
        is_distributed,
        is_main_process,
        multi_process_safe,
        wait_for_the_master,
    )
    from runmgr.integrations.super_gradients.weights import (
        StrictLoad,
        adaptive_load_state_dict,
        load_checkpoint_to_model,
        read_ckpt_state_dict,
        transfer_weights,
    )

_HOMES = {
    "runmgr.disk.catalog": ("get_checkpoints_dir_path", "get_latest_run_id"),
    "runmgr.integrations.super_gradients.averages": (
        "EMA_DECAY_FUNCTIONS", "ConstantDecay", "ExpDecay", "ModelEMA", "ModelWeightAveraging", "ThresholdDecay",
    ),
    "runmgr.integrations.super_gradients.directories": (
        "generate_run_id", "get_ckpt_local_path", "get_experiment_dir_path", "get_project_checkpoints_dir_path",
        "is_run_dir", "validate_run_id",
    ),
    "runmgr.integrations.super_gradients.logger": ("BaseSGLogger",),
    "runmgr.integrations.super_gradients.options": ("start_options",),
    "runmgr.integrations.super_gradients.ranks": (
        "broadcast_from_master", "execute_and_distribute_from_master", "get_world_size", "is_distributed",
        "is_main_process", "multi_process_safe", "wait_for_the_master",
    ),
    "runmgr.integrations.super_gradients.weights": (
        "StrictLoad", "adaptive_load_state_dict", "load_checkpoint_to_model", "read_ckpt_state_dict", "transfer_weights",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # sorted by a test
    "EMA_DECAY_FUNCTIONS", "BaseSGLogger", "ConstantDecay", "ExpDecay", "ModelEMA", "ModelWeightAveraging", "StrictLoad",
    "ThresholdDecay", "adaptive_load_state_dict", "broadcast_from_master", "execute_and_distribute_from_master",
    "generate_run_id", "get_checkpoints_dir_path", "get_ckpt_local_path", "get_experiment_dir_path", "get_latest_run_id",
    "get_project_checkpoints_dir_path", "get_world_size", "is_distributed", "is_main_process", "is_run_dir",
    "load_checkpoint_to_model", "multi_process_safe", "read_ckpt_state_dict", "start_options", "transfer_weights",
    "validate_run_id", "wait_for_the_master",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
