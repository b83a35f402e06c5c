"""super-gradients' training parameters as arguments of `runmgr.start_run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runmgr.disk.shelf import Keep
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping


def start_options(training_params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `training_params` means for `runmgr.start_run(experiment_name, **start_options(training_params))`.

    resume=True                             resume="latest"; a new run where there is none to go on with
    run_id                                  run_id: exactly that run
    resume_path                             fork_from: a new run that begins at this file
    save_ckpt_epoch_list                    keep=Keep(epochs=…); both count finished epochs
    metric_to_watch ("Accuracy")            monitor
    greater_metric_to_watch_is_better (yes)  mode

    All of it also becomes the run's config.
    """
    resume, run_id, path = (training_params.get(name) for name in ("resume", "run_id", "resume_path"))
    if path and (resume or run_id):
        other = f"run_id={run_id!r}" if run_id else f"resume={resume!r}"
        raise InvalidInput(f"resume_path={str(path)!r} starts a new run and {other} continues one; give one of them")
    if resume not in {None, True, False}:
        raise InvalidInput(f"resume={resume!r} must be True or False; the id of a run goes to run_id")
    options: dict[str, Any] = {
        "config": dict(training_params),
        "keep": Keep(epochs=tuple(training_params.get("save_ckpt_epoch_list") or ())),
        "monitor": training_params.get("metric_to_watch", "Accuracy"),
        "mode": "max" if training_params.get("greater_metric_to_watch_is_better", True) else "min",
    }
    if run_id:
        options["run_id"] = run_id
    elif path:
        options["fork_from"] = path
    elif resume:
        options["resume"] = "latest"
    return options
