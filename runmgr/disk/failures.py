"""What the ranks that died left behind, and which of them was first.

One file a rank and attempt in `.runmgr/failures/`, made by exclusive create: `0001-00005-cause.json`, or
`0001-00003-consequence.json` where the error only followed from another rank's end. Ranks that end well leave nothing.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from typing import TYPE_CHECKING, Any

from runmgr.disk import atomic, record
from runmgr.disk.summary import mapping, sequence

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from runmgr.disk.directory import RunDirectory

CAUSE, CONSEQUENCE = "cause", "consequence"
_SHOWN_RANKS = 8
_ERROR_LIMIT = 500


def leave(run: RunDirectory, report: dict[str, Any]) -> Path | None:
    """Write a rank's last words and return their place, or None when that rank has left some already.

    At once, not durably: whoever writes them may be killed in a moment.
    """
    if has_report(run, report["attempt"], report["rank"]):
        return None
    kind = CONSEQUENCE if report["is_consequence"] else CAUSE
    path = run.failure_path(report["attempt"], report["rank"], kind)
    run.failures_path.mkdir(exist_ok=True)
    report = report | {"clock_offset_s": atomic.clock_offset_s(run.failures_path)}
    content = json.dumps(report, indent=1, ensure_ascii=False, default=str)
    try:
        atomic.leave_bytes(path, content.encode(errors="backslashreplace") + b"\n")
    except FileExistsError:
        return None
    return path


def has_report(run: RunDirectory, attempt: int, rank: int) -> bool:
    """Whether a rank's last words lie there."""
    return any(run.failure_path(attempt, rank, kind).exists() for kind in (CAUSE, CONSEQUENCE))


def has_cause(run: RunDirectory, attempt: int) -> bool:
    """Whether any rank of an attempt left a cause of its own."""
    return any(name.endswith(f"-{CAUSE}.json") for name in _names(run, attempt))


def first(run: RunDirectory, attempt: dict[str, Any]) -> dict[str, Any] | None:
    """Say which rank failed first in an attempt, by its record and the reports; None when no rank left one.

    A cause beats a consequence. Among several causes the earliest counts, by the clock of each host set right by the
    file server's. Without any cause a rank is named only if somebody saw it end, waited for it in vain, or it alone
    left nothing.
    """
    number = found if isinstance(found := attempt.get("attempt"), int) else 0
    names = _names(run, number)
    causes = [name for name in names if name.endswith(f"-{CAUSE}.json")]
    reports = sorted(_read(run, causes or names), key=_moment)
    if not reports:
        return None
    found = _of_causes(reports, len(names)) if causes else _of_consequences(reports, attempt)
    return {"attempt": number, **found}


def unheard(number: int) -> dict[str, Any]:
    """Return what is said of an attempt that neither ended nor left a report."""
    return {
        "attempt": number,
        "rank": None,
        "host": None,
        "error": "the attempt did not end, and no rank left a report",
        "report": None,
        "time": None,
        "why": "all ranks were killed at once, or lost their host or its power",
    }


def _of_causes(reports: list[dict[str, Any]], count: int) -> dict[str, Any]:
    earliest = reports[0]
    if len(reports) == 1:
        why = "the only rank with a cause of its own"
    else:
        ranks = _listed(report["rank"] for report in reports[1:])
        clocks = "each host's clock set right by the file server's"
        if any(report.get("clock_offset_s") is None for report in reports):
            clocks = "by the clocks of their hosts, which may differ"
        why = f"the earliest of {len(reports)} causes, {clocks}; the others: {ranks}"
    if count > len(reports):
        why += f"; {count - len(reports)} more ended because of others"
    return _named(earliest, earliest["rank"], earliest.get("host"), why)


def _of_consequences(reports: list[dict[str, Any]], attempt: dict[str, Any]) -> dict[str, Any]:
    """Name the rank that the consequences point at, as well as they do."""
    hosts = {
        rank: mapping(host).get("host")
        for host in sequence(attempt.get("hosts"))
        for rank in sequence(mapping(host).get("ranks"))
        if isinstance(rank, int)
    }
    heard = {report["rank"] for report in reports}
    silent = sorted(set(hosts) - heard)
    earliest = reports[0]
    for report in reports:
        for rank in sorted({int(rank) for rank in mapping(report.get("gone")) if rank.isdecimal()} - heard):
            why = f"no rank left a cause; rank {report['rank']} saw rank {rank} gone"
            return _named(report, rank, hosts.get(rank), why)
    for report in reports:
        for rank in sequence(report.get("blames")):
            if rank != report["rank"]:
                return _named(report, rank, hosts.get(rank), f"no rank left a cause; rank {report['rank']} names it")
    if len(silent) == 1:
        why = "no rank left a cause, and this one alone left nothing: killed, perhaps for memory"
        return _named(earliest, silent[0], hosts.get(silent[0]), why)
    why = f"no rank left a cause; this is the first consequence, on rank {earliest['rank']}"
    if silent:
        why += f". Nothing was left by {_listed(silent)}: killed, or ended with the others"
    return _named(earliest, None, None, why)


def _named(report: dict[str, Any], rank: int | None, host: str | None, why: str) -> dict[str, Any]:
    path = report["path"]
    return {
        "rank": rank,
        "host": host,
        "error": error_line(report),
        "report": os.path.join(*path.parts[-3:]),
        "time": report.get("time"),
        "why": why,
    }


def error_line(report: dict[str, Any]) -> str:
    """Return the error of a report as one line."""
    error = mapping(report.get("error"))
    text = f"{error['type']}: {error.get('message')}" if error.get("type") else str(error.get("message"))
    text = " ".join(text.split())
    return text if len(text) <= _ERROR_LIMIT else text[: _ERROR_LIMIT - 1] + "…"


def sentence(found: dict[str, Any]) -> str:
    """Say in one line which rank failed first, and of what."""
    if found.get("rank") is None and found.get("report") is None:
        return str(found.get("error"))  # that of an attempt of which nothing is left
    who = "no rank is known to have failed first" if found.get("rank") is None else f"rank {found['rank']}"
    host = f" on {found['host']}" if found.get("host") else ""
    return f"{who}{host}: {found.get('error')}"


def _names(run: RunDirectory, attempt: int) -> list[str]:
    try:
        names = os.listdir(run.failures_path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name.startswith(f"{attempt:04d}-") and name.endswith(".json"))


def _read(run: RunDirectory, names: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in names:
        path = run.failures_path / name
        content = record.look_at_json(path)
        if isinstance(content.get("rank"), int):
            found.append(content | {"path": path})
    return found


def _moment(report: dict[str, Any]) -> float:
    """Return when it happened, by the file server's clock as far as that is known."""
    try:
        return datetime.fromisoformat(report["time"]).timestamp() + (report.get("clock_offset_s") or 0.0)
    except (KeyError, TypeError, ValueError):  # a damaged report is never the earliest
        return float("inf")


def _listed(ranks: Iterable[int]) -> str:
    known = list(ranks)
    shown = ", ".join(map(str, known[:_SHOWN_RANKS]))
    more = f" and {len(known) - _SHOWN_RANKS} more" if len(known) > _SHOWN_RANKS else ""
    return f"rank{'' if len(known) == 1 else 's'} {shown}{more}"
