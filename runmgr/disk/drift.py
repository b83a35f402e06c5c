"""What differs between an attempt and the one before: configuration, machines, code, packages."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from runmgr.disk import record

if TYPE_CHECKING:
    from runmgr.disk.directory import RunDirectory

# Most important first; this is also the order of the warning.
_PLAIN = ("world_size", "torch", "python")
_ORDER = ("config", "world_size", "devices", "git", "torch", "python", "packages")
_KEPT = (
    "config",
    "git",
    "packages",
)  # large, so an attempt's record has them only where they differ from the run's own
_SHOWN, _VALUE_LIMIT = 6, 40

Pair = list[Any]


def note(attempt: record.Attempt, run_record: dict[str, Any], state: dict[str, Any]) -> None:
    """Put into a resumed attempt's record, not written yet, what it runs (`state`) and how that differs from before.

    state   config (masked), git, packages, python, torch, world_size, hosts
    """
    first = run_record | {"config": record.read_json(attempt.run.config_path)}
    before = first | _last_record(attempt.run, attempt.number)
    changed = {name: state[name] for name in _KEPT if first.get(name) not in (None, state[name])}
    attempt.content.update(changed, drift=between(before, state))


def between(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what differs, by kind: a pair [before, now] or a dict of pairs; what is not known of before is left out."""
    pairs: dict[str, Any] = {
        "config": _changed(leaves(before.get("config")), leaves(now["config"]))
        if before.get("config") is not None
        else {},
        "devices": _changed(devices(before), devices(now)) if before.get("hosts") else {},
        "git": _changed(code(before["git"]), code(now["git"])) if before.get("git") else {},
        "packages": _changed(before["packages"], now["packages"]) if before.get("packages") is not None else {},
    }
    for name in _PLAIN:
        if before.get(name) not in (None, now[name]):
            pairs[name] = [before[name], now[name]]
    return {name: pairs[name] for name in _ORDER if pairs.get(name)}


def sentence(drift: dict[str, Any], *, shown: int = _SHOWN) -> str:
    """Say it in one line, most important first, long lists cut."""
    parts = []
    for name in _ORDER:
        found = drift.get(name)
        if isinstance(found, dict):
            listed = [f"{key} {_arrow(pair)}" for key, pair in list(found.items())[:shown]]
            more = f" and {len(found) - shown} more" if len(found) > shown else ""
            parts.append(f"{name}: {', '.join(listed)}{more}")
        elif found:
            parts.append(f"{name.replace('_', ' ')} {_arrow(found)}")
    return "; ".join(parts)


def _last_record(run: RunDirectory, number: int) -> dict[str, Any]:
    """Return what the newest attempt before this one wrote of itself; one that was lost says nothing."""
    earlier = [found for found in record.attempt_numbers(run) if found < number]
    return record.look_at_json(run.attempt_path(max(earlier))) if earlier else {}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Pair]:
    names = [*now, *(name for name in before if name not in now)]
    return {name: [before.get(name), now.get(name)] for name in names if before.get(name) != now.get(name)}


def leaves(config: Any, path: str = "") -> dict[str, Any]:
    """Return a configuration's values by their dotted paths; a list is one value."""
    if not isinstance(config, dict) or (path and not config):
        return {path: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


def devices(state: dict[str, Any]) -> dict[str, int]:
    """Return how many devices of each model the hosts have."""
    return dict(Counter(model for host in state["hosts"] for model in host.get("devices") or []))


def code(git: dict[str, Any] | None) -> dict[str, Any]:
    """Return the commit, and a digest in place of the uncommitted changes, which are long."""
    if git is None:
        return {}
    diff = git.get("diff") or ""
    digest = hashlib.sha256(diff.encode(errors="surrogateescape")).hexdigest()[:12] if diff else None
    return {"commit": git.get("commit"), "uncommitted": digest}


def _arrow(pair: Any) -> str:
    before, now = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
    return f"{_shortened(before)} → {_shortened(now)}"


def _shortened(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _VALUE_LIMIT else text[: _VALUE_LIMIT - 1] + "…"
