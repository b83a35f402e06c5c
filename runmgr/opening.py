"""Rank 0's part of a start: decide which run this launch continues, take its lease, begin an attempt."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from runmgr import ranks
from runmgr.disk import atomic, catalog, checkpoints, claiming, drift, failures, provenance, record, summary
from runmgr.disk import directory as directories
from runmgr.disk import lease as leases
from runmgr.disk import shelf as shelves
from runmgr.disk.directory import Experiment, RunDirectory
from runmgr.disk.launches import NamedLaunch, SlurmLaunch
from runmgr.errors import InvalidInput, RunBusy, RunError, RunNotFound
from runmgr.run import Writer
from runmgr.worker import agreement as agreements
from runmgr.worker import loading

if TYPE_CHECKING:
    from runmgr.disk.checkpoints import Mode
    from runmgr.disk.launches import Launch
    from runmgr.disk.shelf import Keep, Shelf

Resume = Literal["auto", "latest", "never"]

_RIVAL_STARTS = 5
_starts: dict[Experiment, int] = {}


class Request(NamedTuple):
    """The arguments of `start_run`, checked."""

    experiment: Experiment
    config: dict[str, Any]
    masked: list[str]
    resume: Resume
    run_id: str | None
    fork_from: str | None
    monitor: str | None
    mode: Mode
    keep: Keep
    tags: tuple[str, ...]


class _Choice(NamedTuple):
    """The run to open: a new one, or an earlier one that this launch may take over at once."""

    run: RunDirectory
    is_new: bool
    takes_over: bool = False
    without_lock: str | None = None
    known_by: Launch | None = None  # what said that the run is this launch's


def open_run(request: Request, places: list[dict[str, Any]], timeout_s: float) -> tuple[dict[str, Any], Writer]:
    """Create or take over the run. Rank 0 only."""
    experiment = request.experiment
    _starts[experiment] = _starts.get(experiment, 0) + 1
    launches = _launches(experiment, _starts[experiment], places, timeout_s)
    for _ in range(_RIVAL_STARTS):
        opened = _choose_and_open(request, launches, places)
        if opened is not None:
            choice, writer = opened
            break
    else:
        raise RunError(
            f"{_RIVAL_STARTS} times in a row another process of the launch {_shown(launches)} made its run first, and it "
            f"was gone again; look for processes that start at once under one RUNMGR_LAUNCH_ID"
        )
    hosts = {place["host"]: place["rank"] for place in reversed(places)}
    answer = {
        "run_dir": str(choice.run.path),
        "attempt": writer.attempt.number,
        "resumed": not choice.is_new,
        "has_checkpoints": bool(writer.shelf.checkpoints),
        "token": _token(choice.run),
        "started": directories.timestamp(directories.now_us()),
        "hosts": sorted(hosts),
        "confirming": sorted(hosts.values()),
        "without_lock": choice.without_lock,
        "launch": launches[0].key if launches else None,
    }
    return answer, writer


def _launches(experiment: Experiment, number: int, places: list[dict[str, Any]], timeout_s: float) -> list[Launch]:
    """Return what this launch is known by, the surest first: a name of its own, then its place in a Slurm job."""
    launches: list[Launch] = []
    key = agreements.launch_key(timeout_s, next(filter(None, (place["launch"] for place in places)), None))
    if key is not None:
        launches.append(NamedLaunch(experiment, key, number))
    start = ranks.slurm_start()
    if start is not None and ranks.launch_id() is None:
        launches.append(SlurmLaunch(experiment, start))
    return launches


def _choose_and_open(
    request: Request, launches: list[Launch], places: list[dict[str, Any]]
) -> tuple[_Choice, Writer] | None:
    """Decide which run this launch opens, and become its writer.

    Leaves nothing behind if that fails, nor if a rival start of this launch made the launch's run meanwhile, or somebody
    removed the new run: then returns None, and the next call continues that run or makes another.
    """
    choice = writer = None
    try:
        choice = _choose(request, launches)
        with record.told_if_gone(choice.run):
            writer = _become_writer(request, choice, places, launches)
        if _remember(launches, choice):
            return choice, writer
    except BaseException as error:
        was_removed = _was_removed(choice, error)
        _undo(choice, writer, launches)
        if not was_removed:
            raise
        return None
    _undo(choice, writer, launches)
    return None


def _was_removed(choice: _Choice | None, error: BaseException) -> bool:
    """Whether somebody moves the run to the trash that was made for this start a moment ago; then it makes another."""
    if choice is None or not choice.is_new:
        return False
    return isinstance(error, RunBusy) or (isinstance(error, RunNotFound) and not record.is_there(choice.run))


def _undo(choice: _Choice | None, writer: Writer | None, launches: list[Launch]) -> None:
    if writer is not None:
        take_back(writer)
        return
    for launch in launches:
        launch.give_back()
    if choice is not None and choice.is_new:
        claiming.remove_unused(choice.run)


def _remember(launches: list[Launch], choice: _Choice) -> bool:
    """Note the run for the launch's next start; False when the run is new, but a rival start made the launch's run."""
    for launch in launches:
        if launch is choice.known_by:
            break
        if not launch.remember(choice.run) and choice.is_new:
            return False
    return True


def _choose(request: Request, launches: list[Launch]) -> _Choice:
    """Decide which run this launch opens."""
    experiment = request.experiment
    own, known_by = _run_of_launch(launches)
    if request.run_id is not None:
        run = experiment.run(request.run_id)
        if not run.path.is_dir():
            raise catalog.run_not_found(experiment, request.run_id)
        return _Choice(run, is_new=False, takes_over=own == run, known_by=known_by if own == run else None)
    if request.resume != "never" and own is not None:
        return _Choice(own, is_new=False, takes_over=True, known_by=known_by)
    if request.resume == "latest":
        for run_id in catalog.run_ids(experiment):
            run = experiment.run(run_id)
            if (run.path / directories.LATEST_NAME).exists() or leases.is_live(run) or _has_saved(run):
                return _Choice(run, is_new=False)
    if request.fork_from is not None:
        _fork_source(request)  # a wrong one must not leave a new run behind
    run, without_lock = claiming.create_run(experiment, secrets.token_hex(16))
    return _Choice(run, is_new=True, without_lock=without_lock)


def _has_saved(run: RunDirectory) -> bool:
    """Whether a run has checkpoints though the name of the latest is gone; one that cannot be read is passed over."""
    try:
        return bool(checkpoints.read_all(run))
    except (RunError, OSError):
        return False


def _run_of_launch(launches: list[Launch]) -> tuple[RunDirectory | None, Launch | None]:
    """Return the run that an earlier start of this launch left, and what it was known by."""
    for launch in launches:
        run = launch.run()
        if run is not None:
            return run, launch
    return None, None


def _shown(launches: list[Launch]) -> str | None:
    return ", ".join(launch.key for launch in launches) or None


def _become_writer(request: Request, choice: _Choice, places: list[dict[str, Any]], launches: list[Launch]) -> Writer:
    """Take the lease and the next attempt, and write down who runs what, where."""
    run = choice.run
    if not choice.is_new:
        record.check_format(run)
    lease, key = leases.Lease(run), _shown(launches)
    lease.acquire(takes_over=choice.takes_over, launch=key)
    try:
        facts = provenance.collect() | {"torch": torch.__version__}
        brief = {name: facts[name] for name in ("argv", "cwd", "user", "python", "torch")} | {"pids": _pids(places)}
        topology = {"world_size": len(places), "hosts": _by_host(places), "launch": key}
        attempt = record.Attempt.begin(run, brief | topology | lease.facts(), after=lease.after)
        run_record = record.RunRecord.read(run)
        if not choice.is_new:
            _look_back(request, attempt, run_record, facts | topology)
        checkpoints.accept_predecessors(attempt)
        _check_mode(request, run_record)
        shelf = shelves.Shelf(attempt, run_record, monitor=request.monitor, mode=request.mode, keep=request.keep)
        shelf.sweep()
        shelf.repair_names()
        if choice.is_new:
            atomic.write_json(run.config_path, provenance.masked(request.config)[0])
            created = attempt.content["started"]
            run_record.content.update(dict.fromkeys(("format", *summary.FIELDS)))  # in front: see there
            run_record.content.update(
                format=record.FORMAT, run_id=run.run_id, experiment_name=request.experiment.name, created=created,
                tags=list(request.tags), parent=None, masked=request.masked, latest=None, best=None, **facts,
            )  # fmt: skip
        run_record.update(
            format=record.FORMAT, status="running", started=attempt.content["started"], ended=None, error=None,
            attempt=attempt.number, monitor=request.monitor, mode=request.mode, **topology,
        )  # fmt: skip
        if choice.is_new and request.fork_from is not None:
            _fork(request, shelf)
    except BaseException:
        lease.release()
        raise
    return Writer(shelf, attempt, run_record, lease, choice.is_new, launches)


def _look_back(request: Request, attempt: record.Attempt, run_record: record.RunRecord, facts: dict[str, Any]) -> None:
    """Note what differs from the attempt before, and which rank failed first in it; written with what is written next."""
    before = run_record.content
    drift.note(attempt, before, facts | {"config": provenance.masked(request.config)[0]})
    number = before.get("attempt")
    if not isinstance(number, int) or before.get("status") == "completed":
        return
    last = record.look_at_json(attempt.run.attempt_path(number)) | {"attempt": number}
    found = failures.first(attempt.run, last)
    if found is None and before.get("status") == "running":
        found = failures.unheard(number)
    if found is not None:
        before["first_failure"] = found


def _check_mode(request: Request, run_record: record.RunRecord) -> None:
    before = run_record.content
    if before.get("monitor") is not None and (request.monitor, request.mode) != (
        before["monitor"],
        before.get("mode"),
    ):
        raise InvalidInput(
            f"run {run_record.run.run_id} was started with monitor={before['monitor']!r}, mode={before.get('mode')!r}, now "
            f"monitor={request.monitor!r}, mode={request.mode!r} are given: its best checkpoint would change its meaning. "
            f"Give the same, or branch off with fork_from={run_record.run.run_id!r}."
        )


def _fork_source(request: Request) -> tuple[Path, checkpoints.Checkpoint | None]:
    """Find the file to branch off from, and its entry when one of our runs recorded it."""
    given = str(request.fork_from)
    parent = request.experiment.run(given) if "/" not in given else None
    if parent is not None and parent.path.is_dir():
        name = directories.LATEST_NAME
    else:
        path = Path(given).expanduser().absolute()
        parent, name = (
            RunDirectory(path.parents[2] if path.parent.name == "checkpoints" else path.parent),
            path.name,
        )
    for entry in reversed(checkpoints.read_all(parent)):
        if entry.kind == "checkpoint" and name in (*entry.names, entry.object_name):
            return entry.path_in(parent), entry
    path = parent.path / name
    if not path.is_file():
        raise RunNotFound(
            f"fork_from={given!r} is neither a run of {request.experiment.path} with a checkpoint nor a file",
            path=str(path),
        )
    if not loading.can_map(path):
        raise InvalidInput(
            f"fork_from={given!r} is no zip file, as torch.save has written since torch 1.6; if torch.load reads it, save "
            f"what it holds anew"
        )
    return path, None


def _fork(request: Request, shelf: Shelf) -> None:
    """Bring the parent's checkpoint and the members of its averages into the new run, and record where they came from."""
    source, entry = _fork_source(request)
    originals = (entry.renamed or {name: name for name in entry.members}) if entry else {}
    renamed = {said: f"0000-{number:06d}.pth" for number, said in enumerate(originals, start=2)}
    facts: dict[str, Any] = {"epoch": entry.epoch, "step": entry.step} if entry else {}
    lying = [source.parent / name for name in originals.values()]
    adopted = shelf.adopt(source, lying, renamed=renamed, members=tuple(renamed.values()), logged=-1, **facts)
    parent_path = source.parents[2] if entry else source.parent
    shelf.run_record.update(parent={"run_id": parent_path.name, "path": str(source), "digest": adopted.digest})


def _by_host(places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    hosts: dict[str, dict[str, Any]] = {}
    for place in places:
        host = hosts.setdefault(place["host"], {"host": place["host"], "ranks": [], "devices": []})
        host["ranks"].append(place["rank"])
        host["devices"] = host["devices"] or place["devices"]
    return list(hosts.values())


def _pids(places: list[dict[str, Any]]) -> dict[str, list[int | None]]:
    """Return each host's process ids in the order of its ranks; None in a container of its own, which counts from 1 again."""
    pids: dict[str, list[int | None]] = {}
    spaces: dict[str, Any] = {}
    for place in places:
        is_visible = spaces.setdefault(place["host"], place["pid_space"]) == place["pid_space"]
        pids.setdefault(place["host"], []).append(place["pid"] if is_visible else None)
    return pids


def _token(run: RunDirectory) -> str:
    try:
        token = run.token_path.read_text()
    except FileNotFoundError:  # a run that another program made
        token = ""
    if not token:
        token = secrets.token_hex(16)
        atomic.write_bytes(run.token_path, token.encode())
    return token


def take_back(writer: Writer) -> None:
    """Undo a start that other ranks could not follow."""
    try:
        for launch in writer.launches:  # first, so that an experiment which this start made is empty again
            launch.give_back()
        if writer.is_new:
            claiming.remove_unused(writer.shelf.run)
        else:
            writer.record.update(status="failed", ended=record.now_text())
    except OSError:  # the error that brought us here is the one to tell
        pass
    finally:
        writer.lease.release()
