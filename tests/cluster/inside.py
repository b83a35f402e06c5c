"""Python functions in hosts, in forks of the test's own process; and a network that is cut and healed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from children import Child
from hosts import SHARED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hosts import Hosts

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NETWORK, _NEW_NAME, _NEW_MOUNTS = 0x40000000, 0x04000000, 0x00020000  # CLONE_NEWNET, _NEWUTS, _NEWNS
_SWITCH_FILTER = "filter"


def start(cluster: Hosts, number: int, function: Callable[..., Any], *args: Any) -> Child:
    """Run `function(told, *args)` in a host. Its default checkpoint root is on the shared file system."""

    def enter() -> None:
        _enter(Path(f"/run/netns/{cluster._namespace(number)}"), _NEW_NETWORK)
        _enter(cluster._state / f"uts.{number}", _NEW_NAME)
        _enter(cluster._state / f"mnt.{number}", _NEW_MOUNTS)
        os.chdir("/")
        os.environ["RUNMGR_CKPT_ROOT_DIR"] = str(SHARED)

    return Child(function, *args, enter=enter)


def call(cluster: Hosts, number: int, function: Callable[..., Any], *args: Any) -> str:
    """Run `function(*args)` in a host to its end and return the text of its result."""

    def tell(told: Callable[[str], object]) -> None:
        try:
            told(f"returned {function(*args)}")
        except BaseException:  # noqa: BLE001  # the parent judges
            told(traceback.format_exc())

    child = start(cluster, number, tell)
    try:
        text = child.read_rest()
    finally:
        child.end()
    assert text.startswith("returned "), text
    return text.removeprefix("returned ")


def cut(cluster: Hosts, number: int) -> None:
    """Let the switch drop every packet from and to a host, both of whom notice nothing."""
    switch = ("ip", "netns", "exec", cluster._namespace("sw"), "nft")
    run = _runner(cluster)
    run(*switch, "add", "table", "bridge", _SWITCH_FILTER)
    run(*switch, "add chain bridge filter cut { type filter hook forward priority 0; policy accept; }")
    for side in ("iifname", "oifname"):
        run(*switch, "add", "rule", "bridge", _SWITCH_FILTER, "cut", side, f"p{number}", "drop")


def heal(cluster: Hosts) -> None:
    """Let every packet through again."""
    _runner(cluster)("ip", "netns", "exec", cluster._namespace("sw"), "nft", "flush", "ruleset")


@contextlib.contextmanager
def ended(children: list[Child]) -> Iterator[None]:
    """Kill what is left of the children in the end."""
    try:
        yield
    finally:
        for child in children:
            child.end()


def _enter(namespace: Path, kind: int) -> None:
    """Move this process, which has one thread, into a namespace; Python has this itself from 3.12 on."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _LIBC.setns(descriptor, kind):
            raise OSError(ctypes.get_errno(), "setns failed", str(namespace))
    finally:
        os.close(descriptor)


def _runner(cluster: Hosts) -> Callable[..., str]:
    import hosts

    return hosts._run
