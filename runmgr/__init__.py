"""One run directory for every torchrun launch, and nothing saved in it is ever lost.

::

    with runmgr.start_run("digits", monitor="val/accuracy") as run:     # every rank
        state = {"net": model, "optimizer": optimizer}
        progress = run.restore(state)                                   # a fresh run: epoch 0
        for epoch in range(progress.epoch, 10):
            ...
            run.save(state, epoch=epoch + 1, metrics={"val/accuracy": accuracy})

Names are loaded on first use, so that looking things up never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runmgr.disk.care import (
        export_checkpoint,
        pin_checkpoint,
        remove_run,
        restore_run,
        tag_run,
        unpin_checkpoint,
        untag_run,
        verify_run,
    )
    from runmgr.disk.catalog import (
        RunInfo,
        best_run,
        get_checkpoints_dir_path,
        get_latest_run_id,
        get_run,
        list_experiments,
        list_runs,
    )
    from runmgr.disk.checkpoints import Checkpoint
    from runmgr.disk.comparing import Comparison, compare_runs
    from runmgr.disk.events import ScalarPoint, read_scalars
    from runmgr.disk.pruning import Pruned, PrunePlan, Verdict, plan_prune
    from runmgr.disk.references import find_run
    from runmgr.disk.shelf import Keep
    from runmgr.disk.trash import TrashedRun, list_trash, purge_trash
    from runmgr.disk.verification import Checked
    from runmgr.errors import (
        AgreementError,
        CheckpointCorrupt,
        CheckpointNotFound,
        InvalidInput,
        InvalidName,
        NotShared,
        RankFailed,
        RankTimeout,
        RunBusy,
        RunError,
        RunNotFound,
        RunProtected,
        Superseded,
    )
    from runmgr.run import Run
    from runmgr.start import start_run
    from runmgr.worker.accumulating import ExponentialAverage, RunningAverage
    from runmgr.worker.batchnorm import recalibrate_batch_norm
    from runmgr.worker.best import BestAverage
    from runmgr.worker.loading import Progress
    from runmgr.worker.preemption import ignore_stop_signals
    from runmgr.worker.saving import SaveHandle
    from runmgr.worker.soup import average_checkpoints
    from runmgr.worker.state import per_rank

    __version__: str

_HOMES = {
    "runmgr.disk.care": (
        "export_checkpoint", "pin_checkpoint", "remove_run", "restore_run", "tag_run", "unpin_checkpoint", "untag_run",
        "verify_run",
    ),
    "runmgr.disk.catalog": (
        "RunInfo", "best_run", "get_checkpoints_dir_path", "get_latest_run_id", "get_run", "list_experiments", "list_runs",
    ),
    "runmgr.disk.checkpoints": ("Checkpoint",),
    "runmgr.disk.pruning": ("PrunePlan", "Pruned", "Verdict", "plan_prune"),
    "runmgr.disk.comparing": ("Comparison", "compare_runs"),
    "runmgr.disk.events": ("ScalarPoint", "read_scalars"),
    "runmgr.disk.references": ("find_run",),
    "runmgr.disk.shelf": ("Keep",),
    "runmgr.disk.trash": ("TrashedRun", "list_trash", "purge_trash"),
    "runmgr.disk.verification": ("Checked",),
    "runmgr.errors": (
        "AgreementError", "CheckpointCorrupt", "CheckpointNotFound", "InvalidInput", "InvalidName", "NotShared",
        "RankFailed", "RankTimeout", "RunBusy", "RunError", "RunNotFound", "RunProtected", "Superseded",
    ),
    "runmgr.run": ("Run",),
    "runmgr.start": ("start_run",),
    "runmgr.worker.accumulating": ("ExponentialAverage", "RunningAverage"),
    "runmgr.worker.batchnorm": ("recalibrate_batch_norm",),
    "runmgr.worker.best": ("BestAverage",),
    "runmgr.worker.loading": ("Progress",),
    "runmgr.worker.preemption": ("ignore_stop_signals",),
    "runmgr.worker.saving": ("SaveHandle",),
    "runmgr.worker.soup": ("average_checkpoints",),
    "runmgr.worker.state": ("per_rank",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # sorted by a test, without the version
    "AgreementError", "BestAverage", "Checked", "Checkpoint", "CheckpointCorrupt", "CheckpointNotFound", "Comparison",
    "ExponentialAverage", "InvalidInput", "InvalidName", "Keep", "NotShared", "Progress", "PrunePlan", "Pruned",
    "RankFailed", "RankTimeout", "Run", "RunBusy", "RunError", "RunInfo", "RunNotFound", "RunProtected",
    "RunningAverage", "SaveHandle", "ScalarPoint", "Superseded", "TrashedRun", "Verdict", "average_checkpoints",
    "best_run", "compare_runs", "export_checkpoint", "find_run", "get_checkpoints_dir_path", "get_latest_run_id",
    "get_run", "ignore_stop_signals", "list_experiments", "list_runs", "list_trash", "per_rank", "pin_checkpoint",
    "plan_prune", "purge_trash", "read_scalars", "recalibrate_batch_norm", "remove_run", "restore_run", "start_run",
    "tag_run", "unpin_checkpoint", "untag_run", "verify_run",
]  # fmt: skip


if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("runmgr")
        if name not in _HOME_OF:
            raise AttributeError(f"module 'runmgr' has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
