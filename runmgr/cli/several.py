"""A command that is given several runs: what goes wrong with one is told, and the others go on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

from runmgr.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

AT_ONCE = 32  # each may watch the mark of a dead writer for half a minute
_T = TypeVar("_T")


class Several:
    """What went wrong so far."""

    def __init__(self) -> None:
        self.errors: list[dict[str, str]] = []

    @property
    def status(self) -> int:
        """The command's exit status."""
        return 1 if self.errors else 0

    def one(self, name: str, function: Callable[[], _T]) -> _T | None:
        """Return what the function returns; None after an error, which is told. From any thread."""
        try:
            return function()
        except (RunError, OSError) as error:
            self.errors.append({"run": name, "error": str(error)})
            print(f"runmgr: {error}", file=sys.stderr)
            return None

    def each(self, names: Iterable[str], function: Callable[[str], _T]) -> list[_T]:
        """Return what the function returns for those with which it went well."""
        found = [self.one(name, lambda name=name: function(name)) for name in names]  # type: ignore[misc]
        return [item for item in found if item is not None]

    def as_json(self, **done: Any) -> dict[str, Any]:
        """Return what was done and what was not."""
        return done | {"errors": self.errors}
