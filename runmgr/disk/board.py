"""A folder of links through which TensorBoard sees runs: nothing but their events, under names that say how they differ."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from runmgr.disk import catalog, directory, drift, record
from runmgr.disk.directory import Experiment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from runmgr.disk.directory import RunDirectory

_MOMENT = re.compile(r"RUN_(\d{4})(\d{4}_\d{6})_\d+")
_SETTINGS, _VALUE_LIMIT, _NAME_LIMIT = 3, 20, 60


class Shown(NamedTuple):
    """A run and what TensorBoard calls it."""

    name: str
    run: RunDirectory


class Board:
    """What is to be seen: single runs, and whole experiments with the runs that begin later, at most `limit` newest at first.

    A run is called by its start and by the settings in which it differs from the others of its experiment, such as
    `1123_153000 lr=0.1`, with the experiment in front where there are several: TensorBoard's columns are narrow, and its
    filter finds runs by any part of a name. A name that was given stays.
    """

    def __init__(
        self, runs: Sequence[RunDirectory], experiments: Sequence[Experiment], root: Path | None, limit: int
    ) -> None:
        self._runs = list(runs)
        self._experiments = list(experiments)
        self._root = root  # all its experiments, where it is given
        self._limit = limit
        places = {run.path.parent for run in runs} | {experiment.path for experiment in experiments}
        self._has_prefix = root is not None or len(places) > 1
        self._configs: dict[RunDirectory, dict[str, Any]] = {}
        self._names: dict[RunDirectory, str] = {}
        self.num_left_out = 0

    @property
    def shown(self) -> list[Shown]:
        """The runs that have written events so far."""
        return [Shown(name, run) for run, name in self._names.items()]

    def refresh(self, folder: Path) -> None:
        """Link what is new since the last time, and let go of runs that were removed."""
        for run in [run for run in self._names if not run.path.is_dir()]:
            shutil.rmtree(folder / self._names.pop(run), ignore_errors=True)
        events = {run: found for run in self._wanted() if (found := _events(run))}
        for run in events:
            if run not in self._configs:
                self._configs[run] = drift.leaves(record.look_at_json(run.config_path))
        places = {run.path.parent for run in events if run not in self._names}
        differing = {place: self._differing(place) for place in places}
        for run, found in events.items():
            if run not in self._names:
                self._names[run] = self._name(run, differing[run.path.parent])
            name = self._names[run]
            (folder / name).mkdir(parents=True, exist_ok=True)
            for entry in found:
                with suppress(FileExistsError):
                    (folder / name / entry).symlink_to(run.path / entry)

    def _wanted(self) -> list[RunDirectory]:
        wanted = dict.fromkeys([*self._names, *self._runs])
        experiments = list(self._experiments)
        if self._root is not None:
            experiments += [Experiment(self._root, name) for name in catalog.list_experiments(self._root)]
        self.num_left_out = 0
        for experiment in experiments:
            ids = list(catalog.run_ids(experiment))  # newest first
            self.num_left_out += max(0, len(ids) - self._limit)
            wanted |= dict.fromkeys(experiment.run(run_id) for run_id in reversed(ids[: self._limit]))
        return list(wanted)

    def _name(self, run: RunDirectory, differing: set[str]) -> str:
        others = [other.run_id for other in self._configs if other != run and other.path.parent == run.path.parent]
        settings = [(name, value) for name, value in self._configs[run].items() if name in differing][:_SETTINGS]
        words = [_moment(run.run_id, others)]
        words += [f"{name.rpartition('.')[2]}={str(value)[:_VALUE_LIMIT]}" for name, value in settings]
        name = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(words)).replace("/", "_")[
            :_NAME_LIMIT
        ]
        experiment = f"{run.path.parent.name}/" if self._has_prefix else ""
        whole = f"{experiment}{name}".encode(errors="backslashreplace").decode()  # bytes that are no UTF-8
        return whole if whole not in self._names.values() else f"{whole} {run.run_id}"

    def _differing(self, place: Path) -> set[str]:
        """Return the settings that are not the same in all runs of an experiment that have any."""
        configs = [config for run, config in self._configs.items() if run.path.parent == place and config]
        first = configs[0] if configs else {}
        return {name for config in configs for name in first | config if first.get(name) != config.get(name)}


def _moment(run_id: str, others: list[str]) -> str:
    """Return the part of a run id that tells it from the others: without the year and the microseconds, if it can be."""
    moment = _MOMENT.fullmatch(run_id)
    year = f"{directory.RUN_PREFIX}{moment[1]}" if moment else ""
    if moment and all(other.startswith(year) and moment[2] not in other for other in others):
        return moment[2]
    return run_id.removeprefix(directory.RUN_PREFIX)


def _events(run: RunDirectory) -> list[str]:
    """Return what TensorBoard reads in a run: the attempts' files, and folders such as `add_scalars` makes."""
    files, folders = [], []
    with suppress(OSError), os.scandir(run.path) as entries:
        for entry in entries:
            if entry.name.startswith(directory.EVENTS_PREFIX):
                files.append(entry.name)
            elif not entry.name.startswith(".") and entry.is_dir():
                folders.append(entry.name)
    return files and files + folders
