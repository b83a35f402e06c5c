"""What differs between runs: configuration, code, machines, packages, metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runmgr.disk import drift, record
from runmgr.disk.catalog import RunInfo
from runmgr.disk.directory import RunDirectory
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

KINDS = ("run", "metrics", "config", "git", "environment", "packages")
_ENVIRONMENT = ("python", "torch", "world_size", "platform", "user")


@dataclass(frozen=True)
class Comparison:
    """Values of several runs side by side: kind → name → one value a run, in the order of `runs`, None where it has none.

    The kinds are run, metrics, config, git, environment and packages. `different` holds what is not the same in all.
    """

    runs: tuple[RunInfo, ...]
    different: dict[str, dict[str, tuple[Any, ...]]]
    same: dict[str, dict[str, tuple[Any, ...]]]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data; what is the same as one value."""
        return {
            "runs": [run.as_json() for run in self.runs],
            "different": {
                kind: {name: list(row) for name, row in rows.items()} for kind, rows in self.different.items()
            },
            "same": {kind: {name: row[0] for name, row in rows.items()} for kind, rows in self.same.items()},
        }


def compare_runs(
    runs: Sequence[RunInfo | str | os.PathLike[str]], ckpt_root_dir: str | os.PathLike[str] | None = None
) -> Comparison:
    """Return what is different and what is the same in two or more runs, or in what references mean.

    A run is what its newest attempt ran; metrics are those of its best and of its latest checkpoint.
    """
    from runmgr.disk.references import find_run

    if len(runs) < 2:
        raise InvalidInput(f"comparing takes two runs or more, not {len(runs)}")
    found = tuple(run if isinstance(run, RunInfo) else find_run(run, ckpt_root_dir) for run in runs)
    facts = [_facts(run) for run in found]
    different: dict[str, dict[str, tuple[Any, ...]]] = {kind: {} for kind in KINDS}
    same: dict[str, dict[str, tuple[Any, ...]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name in dict.fromkeys(name for fact in facts for name in fact[kind]):
            row = tuple(fact[kind].get(name) for fact in facts)
            (same if all(value == row[0] for value in row) else different)[kind][name] = row
    return Comparison(found, different, same)


def _facts(run: RunInfo) -> dict[str, dict[str, Any]]:
    place = RunDirectory(run.path)
    content = {**run.record, "config": record.look_at_json(place.config_path)} | record.newest_record(place)
    packages, hosts = content.get("packages"), content.get("hosts")
    return {
        "run": {"status": run.status, "attempt": run.attempt, "tags": " ".join(run.tags)},
        "metrics": _metrics("best", run.best) | _metrics("latest", run.latest),
        "config": drift.leaves(content["config"]),
        "git": _git(content.get("git")),
        "environment": {name: content.get(name) for name in _ENVIRONMENT} | _devices(hosts),
        "packages": packages if isinstance(packages, dict) else {},
    }


def _metrics(which: str, checkpoint: dict[str, Any] | None) -> dict[str, Any]:
    if checkpoint is None:
        return {}
    metrics = checkpoint.get("metrics")
    counts = {f"{which} {name}": checkpoint.get(name) for name in ("epoch", "step")}
    named = metrics.items() if isinstance(metrics, dict) else ()
    return counts | {f"{which} {name}": value for name, value in named}


def _git(git: Any) -> dict[str, Any]:
    if not isinstance(git, dict):
        return {}
    texts = {name: value for name in ("commit", "branch", "diff") if isinstance(value := git.get(name), str)}
    return drift.code(texts) | {"branch": texts.get("branch")}


def _devices(hosts: Any) -> dict[str, Any]:
    known = [host for host in hosts if isinstance(host, dict)] if isinstance(hosts, list) else []
    if not known:
        return {}
    models = [
        {"devices": [str(name) for name in found]} for host in known if isinstance(found := host.get("devices"), list)
    ]
    counted = drift.devices({"hosts": models})
    return {
        "hosts": ", ".join(str(host.get("host")) for host in known),
        "devices": ", ".join(f"{count} x {model}" for model, count in counted.items()),
    }
