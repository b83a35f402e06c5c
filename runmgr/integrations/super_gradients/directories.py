"""Where experiments, runs and checkpoints lie, under super-gradients' names. Looking up creates nothing, needs no torch."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from runmgr.disk import catalog, claiming, directory
from runmgr.disk.directory import Experiment
from runmgr.errors import InvalidInput, RunNotFound

if TYPE_CHECKING:
    Root = str | os.PathLike[str] | None


def generate_run_id(experiment_name: str | None = None, ckpt_root_dir: Root = None) -> str:
    """Make the experiment's next run directory and return its id, the same on all ranks. Every rank.

    Greater than each id before it. super-gradients' own took no experiment, so nothing kept two launches from the same
    id; here the directory that is made is what makes it unique, and `runmgr.start_run(…, run_id=…)` goes on in it.
    """
    from runmgr.worker import agreement

    def make(_: object) -> str:
        if experiment_name is None:
            raise InvalidInput(
                "generate_run_id() without an experiment would reserve nothing, and two launches could get the same id; "
                "give experiment_name (and ckpt_root_dir), or let runmgr.start_run make the run"
            )
        root = directory.resolve_root(ckpt_root_dir)
        experiment = Experiment(root, directory.check_name(experiment_name, "experiment name"))
        run, _without_lock = claiming.create_run(experiment, secrets.token_hex(16))
        return run.run_id

    joined = agreement.shared()
    run_id: str = joined.agree("generate a run id", make)
    joined.linger()
    return run_id


def is_run_dir(dirname: str | os.PathLike[str]) -> bool:
    """Whether the last part of a path looks like a run's directory, ours or super-gradients'."""
    return directory.is_run_id(os.path.basename(os.path.normpath(dirname)))


def validate_run_id(run_id: str, experiment_name: str, ckpt_root_dir: Root = None) -> None:
    """Raise RunNotFound, which is a FileNotFoundError, unless the experiment has such a run."""
    catalog.get_checkpoints_dir_path(experiment_name, ckpt_root_dir, run_id)


def get_experiment_dir_path(experiment_name: str, checkpoints_root_dir: Root = None) -> str:
    """Return the directory of an experiment, there or not."""
    return catalog.get_checkpoints_dir_path(experiment_name, checkpoints_root_dir)


def get_project_checkpoints_dir_path() -> str:
    """Return the root that is used where none is given."""
    return str(directory.default_root())


def get_ckpt_local_path(
    experiment_name: str,
    ckpt_name: str,
    external_checkpoint_path: str | None = None,
    ckpt_root_dir: Root = None,
    run_id: str | None = None,
) -> str:
    """Return where a checkpoint lies: the external path if given, else `ckpt_name` of the run, by default of the latest.

    super-gradients up to 3.1.2 had no runs: a file that lies in the experiment itself is found where no run has one.
    """
    if external_checkpoint_path:
        return external_checkpoint_path
    directory.check_name(ckpt_name, "file name")
    chosen = run_id or catalog.get_latest_run_id(experiment_name, ckpt_root_dir)
    path = os.path.join(catalog.get_checkpoints_dir_path(experiment_name, ckpt_root_dir, chosen), ckpt_name)
    if chosen is None and not os.path.exists(path):
        raise RunNotFound(
            f"no run of {os.path.dirname(path)} has a {directory.LATEST_NAME}", path=os.path.dirname(path)
        )
    return path
