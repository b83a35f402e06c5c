"""Rank 0 acts for all, under super-gradients' names.

Rank 0 is the one of the whole launch, not one on each host. All of it works before `init_process_group` under torchrun, and
needs no device. What raises on rank 0 raises on every rank, at once; a rank that does not come is named.
"""

from __future__ import annotations

import functools
import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from runmgr.errors import InvalidInput
from runmgr.worker import agreement, loading, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_CANNOT_PICKLE = (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError)


def is_main_process() -> bool:
    """Whether this is rank 0, the one that writes."""
    return agreement.current_ranks().is_main


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return get_world_size() > 1


def get_world_size() -> int:
    """Return the number of ranks."""
    return agreement.current_ranks().world_size


def multi_process_safe(function: Callable[Arguments, Result]) -> Callable[Arguments, Result | None]:
    """Let only rank 0 call the function; on the others it does nothing and returns None. Any rank, nobody waits."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result | None:
        return function(*args, **options) if is_main_process() else None

    return call


def execute_and_distribute_from_master(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let rank 0 call the function, and return its result, or raise its error, on every rank. Every rank.

    The result is small (it travels as text) and made of tensors, numbers, text and containers of them: it is read with
    `weights_only=True`. Also alone it is a copy.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        name = getattr(function, "__qualname__", repr(function))
        return _distributed(f"call {name}", lambda: function(*args, **options))

    return call


def broadcast_from_master(data: Result) -> Result:
    """Return rank 0's data on every rank; it may hold what `execute_and_distribute_from_master` returns. Every rank."""
    return _distributed("broadcast rank 0's data", lambda: data)


@contextmanager
def wait_for_the_master(local_rank: int | None = None) -> Iterator[None]:  # noqa: ARG001  # super-gradients' signature
    """Let rank 0 do the block first, for as long as it takes, then all others. Every rank; it begins when all have come.

    If rank 0 fails in it, every rank raises that error and no other enters the block. `local_rank` is not needed.
    """
    joined = agreement.shared()
    joined.agree("come to what rank 0 does first", lambda _: None)  # from here on the others see that rank 0 lives
    what = "do what the others wait for"
    if not joined.ranks.is_main:
        joined.agree(what, lambda _: None)
        yield
        return
    failures: list[BaseException] = []
    try:
        with joined.working():
            yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  # the others must not wait for it
        failures.append(error)

    def decide(_: object) -> None:
        for failure in failures:
            raise failure

    joined.agree(what, decide)
    joined.linger()


def _distributed(what: str, make: Callable[[], Result]) -> Result:
    def decide(_: object) -> str:
        value = make()
        try:
            text = writing.packed(value)
            loading.unpacked(text)
        except _CANNOT_PICKLE as error:
            raise InvalidInput(
                f"rank 0 wanted to {what}, but a {type(value).__name__} that holds such things does not travel between "
                f"ranks, only tensors, numbers, text and containers of them do: {str(error).splitlines()[0]}"
            ) from None
        return text

    joined = agreement.shared()
    text = joined.agree(what, decide)
    joined.linger()  # rank 0 may be on its way out, and with it the store
    result: Any = loading.unpacked(text)
    return result  # type: ignore[no-any-return]
