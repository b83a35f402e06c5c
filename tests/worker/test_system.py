"""What machines do while a run trains is in rank 0's events, and costs the training nothing when it goes wrong."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest
from processes import run_ranks, values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runmgr
from runmgr import ranks
from runmgr.errors import InvalidInput
from runmgr.worker import system

NAMES = {
    "cpu_percent", "memory_percent", "memory_available_gb", "disk_percent", "disk_free_gb", "network_received_mb_per_s",
    "network_sent_mb_per_s",
}  # fmt: skip


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """NVIDIA's library as far as it is asked, with two GPUs of which one does not know its power; no real GPU was asked."""
    library = types.ModuleType("pynvml")

    def power(device):
        if device == 1:
            raise NVMLError("Not Supported")
        return 250_000

    library.NVMLError, library.NVML_TEMPERATURE_GPU = NVMLError, 0
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetCount = lambda: 2
    library.nvmlDeviceGetHandleByIndex = lambda number: number
    library.nvmlDeviceGetUtilizationRates = lambda device: types.SimpleNamespace(gpu=90 + device)
    library.nvmlDeviceGetMemoryInfo = lambda device: types.SimpleNamespace(used=(device + 1) * 10**9)
    library.nvmlDeviceGetPowerUsage = power
    library.nvmlDeviceGetTemperature = lambda device, _: 60
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def _events(run_dir) -> EventAccumulator:
    return EventAccumulator(str(run_dir)).Reload()


def _until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _has_events(run):
    return any(b"system/" in path.read_bytes() for path in run.run_dir.glob("events.*"))


def test_one_rank_finds_its_host_in_the_events_at_the_step_that_training_is_at(root, nvml):
    host = ranks.from_environment().host
    with runmgr.start_run("x", system_metrics_every_s=0.05) as run:
        run.log_scalars({"loss": 1}, step=7)
        _until(lambda: _has_events(run))
    found = _events(run.run_dir)
    tags = {tag.removeprefix(f"system/{host}/") for tag in found.Tags()["scalars"]} - {"loss"}
    gpus = {"gpu0_percent", "gpu0_memory_gb", "gpu0_power_w", "gpu0_temperature_c"}
    assert tags == NAMES | gpus | {"gpu1_percent", "gpu1_memory_gb", "gpu1_temperature_c"}
    assert {event.step for event in found.Scalars(f"system/{host}/cpu_percent")} == {7}
    assert found.Scalars(f"system/{host}/gpu0_power_w")[0].value == 250
    assert found.Scalars(f"system/{host}/gpu1_memory_gb")[0].value == 2
    for name in ("cpu_percent", "memory_percent", "disk_percent"):
        assert 0 <= found.Scalars(f"system/{host}/{name}")[0].value <= 100


def _rank(rank, root):
    with runmgr.start_run("x", ckpt_root_dir=root, system_metrics_every_s=0.05) as run:
        names = {thread.name for thread in threading.enumerate()}
        if rank == 0:
            _until(lambda: _has_events(run) and _hosts(run.run_dir) >= {"a", "b"})
        run._agreement.agree("end", lambda _: None)
    return "runmgr-system" in names, "runmgr-system" in {thread.name for thread in threading.enumerate()}


def _hosts(run_dir) -> set[str]:
    return {tag.split("/")[1] for tag in _events(run_dir).Tags()["scalars"]}


def test_every_host_is_seen_once_and_only_rank_0_writes(root, monkeypatch):
    def placed(original=ranks.from_environment, **options):
        found = original(**options)
        return found._replace(host="a" if found.rank < 2 else "b")

    monkeypatch.setattr(ranks, "from_environment", placed)
    outcomes = values(run_ranks(3, _rank, root))
    assert [has for has, _ in outcomes] == [True, False, True]
    assert not any(left for _, left in outcomes)
    (run_dir,) = root.glob("x/RUN_*")
    assert len(list(run_dir.glob("events.*"))) == 1
    assert _hosts(run_dir) == {"a", "b"}


def test_whatever_goes_wrong_is_one_line_in_the_log(root, monkeypatch):
    def break_(_):
        raise RuntimeError("sensors on fire")

    monkeypatch.setattr(psutil, "disk_usage", break_)
    with runmgr.start_run("x", system_metrics_every_s=0.01) as run:
        (log,) = run.run_dir.glob("log_*.txt")
        _until(lambda: "not measured any more: RuntimeError: sensors on fire" in log.read_text())
    assert log.read_text().count("sensors") == 1
    assert runmgr.get_run("x", run.run_id).status == "completed"


def test_a_gpu_or_driver_that_is_lost_costs_its_own_numbers(root, nvml):
    def lost(device):
        raise NVMLError("GPU is lost")

    machine = system.Machine(root.parent)
    nvml.nvmlDeviceGetHandleByIndex = lost
    assert set(machine.look()) == NAMES
    nvml.nvmlInit = lambda: lost(0)
    assert set(system.Machine(root.parent).look()) == NAMES


def test_without_psutil_or_when_not_wanted_nothing_is_measured(root, monkeypatch):
    with runmgr.start_run("x", system_metrics_every_s=None):
        assert "runmgr-system" not in {thread.name for thread in threading.enumerate()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with runmgr.start_run("x") as run:
        assert "runmgr-system" not in {thread.name for thread in threading.enumerate()}
        assert "pip install 'runmgr[system]'" in next(run.run_dir.glob("log_*.txt")).read_text()


@pytest.mark.parametrize("period", [0, -1, "30", float("nan"), True])
def test_a_period_that_is_none_is_refused(period):
    with pytest.raises(InvalidInput, match="must be a number of seconds above 0, or None"):
        runmgr.start_run("x", system_metrics_every_s=period)


def test_a_short_run_leaves_no_events_and_a_look_costs_next_to_nothing(root):
    with runmgr.start_run("x") as run:
        pass
    assert not list(run.run_dir.glob("events.*"))
    machine = system.Machine(Path("/"))
    start = time.process_time()
    for _ in range(20):
        machine.look()
    assert (time.process_time() - start) / 20 < 0.03, "0.1 % of a core, every 30 s"
