"""A notebook's kernel for tests: cells in, what a reader sees under them out."""

from __future__ import annotations

import queue
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jupyter_client.blocking import BlockingKernelClient
    from jupyter_client.manager import KernelManager

_LIMIT_S = 240.0


class Kernel:
    """An ipykernel of this Python, as a notebook has one."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self._client = self._connect()

    def run(self, code: str, *, interrupt_after_s: float | None = None) -> str:
        """Execute a cell; return what it printed, and its error as `Name: text`."""
        request = self._client.execute(code)
        output, begun = "", time.monotonic()
        while True:
            waited_s = time.monotonic() - begun
            assert waited_s < _LIMIT_S, output
            if interrupt_after_s is not None and waited_s > interrupt_after_s:
                interrupt_after_s = None
                self.manager.interrupt_kernel()
            try:
                message = self._client.get_iopub_msg(timeout=0.1)
            except queue.Empty:
                continue
            content = message["content"]
            if message["parent_header"].get("msg_id") != request:
                continue
            match message["msg_type"]:
                case "stream":
                    output += content["text"]
                case "execute_result":
                    output += content["data"]["text/plain"] + "\n"
                case "error":
                    output += f"{content['ename']}: {content['evalue']}\n"
                case "status" if content["execution_state"] == "idle":
                    return output

    def restart(self, *, now: bool = False) -> None:
        self.close()
        self.manager.restart_kernel(now=now)
        self._client = self._connect()

    def close(self) -> None:
        self._client.stop_channels()

    def _connect(self) -> BlockingKernelClient:
        client = self.manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=_LIMIT_S)
        return client


@contextmanager
def kernel(folder: Path, environ: dict[str, str]) -> Iterator[Kernel]:
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(folder / ".kernel"))
    manager.start_kernel(cwd=str(folder), env=environ)
    opened = Kernel(manager)
    try:
        yield opened
    finally:
        opened.close()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
