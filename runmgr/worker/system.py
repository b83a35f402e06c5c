"""What the machines do while a run trains: processors, memory, disk, network and GPUs of each host, for rank 0's events.

It needs psutil, and nvidia-ml-py for GPUs; where they are missing nothing is measured. No CUDA context, no collective.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from runmgr.worker import memory

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from runmgr.worker.agreement import Agreement

_BEGIN_S = 1.0  # a run that ends sooner imports nothing
_JOIN_S = 2.0


class SystemMetrics:
    """A thread on one rank of each host looks at its machine every `every_s` seconds; rank 0 writes what all of them saw.

    The others put theirs into the ranks' store, under one key each. Whatever goes wrong ends the measuring with a line
    in the log, never the training. `write(values)` is called on rank 0, in the thread.
    """

    def __init__(
        self,
        agreement: Agreement,
        looking: Sequence[int],
        directory: Path,
        write: Callable[[dict[str, float]], None],
        logger: logging.Logger,
        *,
        every_s: float | None,
    ) -> None:
        self._agreement = agreement
        self._others = [rank for rank in looking if rank != 0]
        self._directory = directory
        self._write = write
        self._logger = logger
        self._every_s = every_s or 0.0
        self._seen: dict[int, str] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if every_s is None or agreement.ranks.rank not in looking:
            return
        if importlib.util.find_spec("psutil") is None:
            logger.info("no system metrics, because psutil is not installed: pip install 'runmgr[system]'")
            return
        thread = threading.Thread(target=self._watch, name="runmgr-system", daemon=True)
        with suppress(RuntimeError):  # no thread can be had: no metrics
            thread.start()
            self._thread = thread

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)  # a file server that is away may hold it longer

    def _watch(self) -> None:
        try:
            if self._ended.wait(min(_BEGIN_S, self._every_s)):
                return
            machine = Machine(self._directory)
            while not self._ended.wait(self._every_s):
                self._tell(machine.look())
        except Exception as error:  # noqa: BLE001  # whatever a driver, a file system or the store says
            self._logger.info("system metrics are not measured any more: %s: %s", type(error).__name__, error)

    def _tell(self, values: dict[str, float]) -> None:
        ranks = self._agreement.ranks
        seen = {f"{ranks.host}/{name}": value for name, value in values.items()}
        if not ranks.is_main:
            self._agreement.post(f"system/{ranks.rank}", json.dumps([time.time(), seen]))  # the time makes it a new one
            return
        self._write(seen)
        for rank in self._others:
            (text,) = self._agreement.look([f"system/{rank}"]) or ("",)
            if text != self._seen.get(rank, ""):
                self._seen[rank] = text
                self._write(json.loads(text)[1])


class Machine:
    """This host, as psutil and NVML see it; rates and loads are those since the last look."""

    def __init__(self, directory: Path) -> None:
        import psutil

        self._psutil = psutil
        self._directory = directory
        self._nvml = _nvml()
        psutil.cpu_percent()
        self._looked, self._network = time.monotonic(), self._network_bytes()

    def look(self) -> dict[str, float]:
        """Return the metrics by their names. `disk` is the file system of the run; GPUs are numbered as by nvidia-smi."""
        disk = self._psutil.disk_usage(str(self._directory))
        looked, network = time.monotonic(), self._network_bytes()
        seconds = max(looked - self._looked, 1e-3)
        received, sent = ((now - before) / seconds for now, before in zip(network, self._network, strict=True))
        self._looked, self._network = looked, network
        return {
            "cpu_percent": self._psutil.cpu_percent(),
            "memory_percent": self._psutil.virtual_memory().percent,
            "memory_available_gb": memory.available_bytes() / 1e9,
            "disk_percent": disk.percent,
            "disk_free_gb": disk.free / 1e9,
            "network_received_mb_per_s": received / 1e6,
            "network_sent_mb_per_s": sent / 1e6,
            **self._gpus(),
        }

    def _network_bytes(self) -> tuple[int, int]:
        """Return what was received and sent since the host began, without what it told itself."""
        counters = self._psutil.net_io_counters(pernic=True)
        outward = [counter for name, counter in counters.items() if name != "lo"]
        return sum(counter.bytes_recv for counter in outward), sum(counter.bytes_sent for counter in outward)

    def _gpus(self) -> dict[str, float]:
        found: dict[str, float] = {}
        nvml = self._nvml
        if nvml is None:
            return found
        for number in range(nvml.nvmlDeviceGetCount()):
            with suppress(nvml.NVMLError):  # it fell off the bus; the others may be well
                device = nvml.nvmlDeviceGetHandleByIndex(number)
                for name, ask in _GPU_QUESTIONS.items():
                    with suppress(nvml.NVMLError):  # not every GPU, or slice of one, knows everything
                        found[f"gpu{number}_{name}"] = float(ask(nvml, device))
        return found


_GPU_QUESTIONS: dict[str, Callable[[Any, Any], float]] = {
    "percent": lambda nvml, device: nvml.nvmlDeviceGetUtilizationRates(device).gpu,
    "memory_gb": lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device).used / 1e9,
    "power_w": lambda nvml, device: nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
    "temperature_c": lambda nvml, device: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
}


def _nvml() -> Any:
    """Return NVIDIA's library, initialised; None where it, the driver or a GPU is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
