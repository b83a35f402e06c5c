"""Which run is meant: `RUN_…`, `experiment`, `experiment/latest`, `experiment/best`, `experiment@-2`, or a path."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from runmgr.disk import catalog, directory
from runmgr.errors import RunNotFound

if TYPE_CHECKING:
    from runmgr.disk.catalog import RunInfo

_COUNTED = re.compile(r"(.+)@(-?\d{1,9})")


def find_run(reference: str | os.PathLike[str], ckpt_root_dir: str | os.PathLike[str] | None = None) -> RunInfo:
    """Return the run that a reference means; raises RunNotFound with the nearest names, or InvalidName.

    RUN_…               the run of that id, whichever experiment it is in
    experiment          its latest run, the newest that has a checkpoint; also experiment/latest
    experiment/best     its best run by the metric that its newest run monitors
    experiment/RUN_…    exactly that one
    experiment@-1       its newest run, with or without a checkpoint; @-2 the one before; @0 its first
    a path              of a run directory, of a file in one, or of an experiment's directory
    """
    root = directory.resolve_root(ckpt_root_dir)
    text = os.fspath(reference)
    experiment, slash, which = text.rstrip("/").partition("/")
    if (run_path := _run_path(text)) is not None:
        return catalog.get_run(run_path.parent.name, run_path.name, run_path.parent.parent)
    if _looks_like_a_path(text) or (slash and not _is_directory(root / experiment) and _is_directory(_normal(text))):
        return catalog.get_run(_normal(text).name, None, _normal(text).parent)
    if not slash and directory.is_run_id(experiment):
        return _by_id(experiment, root)
    if not slash and (counted := _COUNTED.fullmatch(experiment)) and not _is_directory(root / experiment):
        return _by_number(counted[1], int(counted[2]), root)
    if which == "best":
        return catalog.best_run(experiment, ckpt_root_dir=root)
    return catalog.get_run(experiment, None if which in {"", "latest"} else which, root)


def _run_path(text: str) -> Path | None:
    """Return the run directory that a path leads to or into; None where it is no such path."""
    if "\0" in text:
        return None
    path, here = _normal(text), Path.cwd()
    for candidate in (path, *path.parents):
        if candidate == here and not _looks_like_a_path(text):
            break  # a word that is typed inside a run directory does not mean that run
        if directory.is_run_id(candidate.name) and _is_directory(candidate):
            return candidate
    return path if directory.is_run_id(path.name) and _looks_like_a_path(text) else None


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~/")) or text in {".", ".."}


def _normal(text: str) -> Path:
    return Path(os.path.normpath(Path(text).expanduser().absolute()))


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a loop of links, a folder that is not ours to look into
        return False


def _by_id(run_id: str, root: Path) -> RunInfo:
    directory.check_name(run_id, "run id")
    experiments = catalog.list_experiments(root)
    for name in experiments:
        if _is_directory(root / name / run_id):
            return catalog.get_run(name, run_id, root)
    known = {found: name for name in experiments for found in catalog.run_ids(directory.Experiment(root, name))}
    near = catalog.nearest(run_id, list(known), shown=lambda found: f"{known[found]}/{found}")
    raise RunNotFound(f"no experiment in {root} has a run {run_id}{near}", path=str(root))


def _by_number(experiment_name: str, number: int, root: Path) -> RunInfo:
    """Count as Python does: -1 is the newest run, 0 the first."""
    experiment = catalog.find_experiment(experiment_name, root)
    ids = list(catalog.run_ids(experiment))
    place = -number - 1 if number < 0 else len(ids) - 1 - number
    if not 0 <= place < len(ids):
        has = f"it has {len(ids)}: @-1 is the newest, @-{len(ids)} the first" if ids else "it has none"
        raise RunNotFound(f"{experiment.path} has no run @{number}; {has}", path=str(experiment.path))
    return catalog.get_run(experiment_name, ids[place], root)
