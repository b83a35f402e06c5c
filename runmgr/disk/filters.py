"""Which runs are meant: by status, tag, metric and age."""

from __future__ import annotations

import operator
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from runmgr.disk.directory import RUN_ID_FORMAT
from runmgr.disk.metrics import number, value_of
from runmgr.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from runmgr.disk.catalog import RunInfo

STATUSES = ("running", "completed", "failed", "interrupted", "preempted", "lost", "unreadable", "unknown")
_CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(>=|<=|!=|==|=|>|<)\s*([^<>=!\s]+)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class Condition(NamedTuple):
    """`val/accuracy>0.9`: a metric of a run's best or latest checkpoint, or its epoch or step, against a number."""

    name: str
    compare: Callable[[float, float], bool]
    limit: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read NAME OPERATOR NUMBER; raises InvalidInput."""
        found = _CONDITION.fullmatch(text)
        limit = number(found[3]) if found else None
        if found is None or limit is None:
            raise InvalidInput(
                f"{text!r} is no condition; write NAME, one of {' '.join(_COMPARE)}, and a number, such as 'val/accuracy>0.9'"
            )
        return cls(found[1], _COMPARE[found[2]], limit)

    def holds(self, run: RunInfo) -> bool:
        """Whether one of the run's two checkpoints fulfils it; a run that knows no such metric does not."""
        values = (value_of(checkpoint, self.name) for checkpoint in (run.best, run.latest))
        return any(value is not None and self.compare(value, self.limit) for value in values)


class Filter(NamedTuple):
    """What all has to hold of a run; nothing given lets every run through. Ages are in seconds."""

    statuses: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    conditions: tuple[Condition, ...] = ()
    newer_than_s: float | None = None
    older_than_s: float | None = None

    @classmethod
    def of(
        cls,
        *,
        status: str | Iterable[str] = (),
        tags: str | Iterable[str] = (),
        where: str | Iterable[str] = (),
        newer_than_s: float | None = None,
        older_than_s: float | None = None,
    ) -> Filter:
        """Make one from what a user gives; raises InvalidInput."""
        statuses = frozenset(_several(status))
        if unknown := sorted(statuses - set(STATUSES)):
            raise InvalidInput(f"there is no status {unknown[0]!r}; there are {', '.join(STATUSES)}")
        conditions = tuple(map(Condition.parse, _several(where)))
        return cls(statuses, frozenset(_several(tags)), conditions, newer_than_s, older_than_s)

    @property
    def lets_all_through(self) -> bool:
        """Whether nothing was asked for."""
        return self == Filter()

    def accepts_id(self, run_id: str) -> bool:
        """Whether a run is of the age that is asked for, by its id, so without looking at it."""
        if self.newer_than_s is None and self.older_than_s is None:
            return True
        created_s = created_of(run_id)
        if created_s is None:
            return False
        age_s = time.time() - created_s
        is_new_enough = self.newer_than_s is None or age_s <= self.newer_than_s
        return is_new_enough and (self.older_than_s is None or age_s >= self.older_than_s)

    def accepts(self, run: RunInfo) -> bool:
        """Whether all the rest holds of a run."""
        if self.statuses and run.status not in self.statuses:
            return False
        return self.tags <= set(run.tags) and all(condition.holds(run) for condition in self.conditions)


def created_of(run_id: str) -> float | None:
    """Return when a run was made by its id, in seconds since 1970; None where it does not say."""
    try:
        return datetime.strptime(run_id, RUN_ID_FORMAT).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _several(given: str | Iterable[str]) -> Iterable[str]:
    return (given,) if isinstance(given, str) else given
