"""The copy that a background save writes: equal bits, the same sharing, reused memory, and a way out when memory is short."""

from __future__ import annotations

import ctypes
import io
import mmap
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from processes import clean_environment
from torch import nn

import runmgr
from runmgr.worker import staging


@pytest.fixture
def stage():
    found = staging.Staging()
    yield found
    found.release()


def _file_size(value) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return len(buffer.getvalue())


def test_the_copy_has_the_same_bits_shapes_and_sharing(stage):
    base = torch.arange(12.0)
    state = OrderedDict(
        a=base.view(3, 4), tied=base, part=base[4:8], turned=base.view(3, 4).t(), empty=torch.empty(0, 3),
        half=torch.randn(5).bfloat16(), number=torch.tensor(7), flags=torch.tensor([True, False]), z=torch.randn(2).cfloat(),
        nested=[{"x": (torch.ones(3), 5, "text", None)}, torch.Size([1, 2])],
    )  # fmt: skip
    copied = stage.copy(staging.ordinary(state))
    assert type(copied) is OrderedDict
    pairs = list(zip(staging.tensors_in(state), staging.tensors_in(copied), strict=True))
    assert len(pairs) == 10
    for original, copy in pairs:
        assert (copy.dtype, copy.shape, copy.stride()) == (original.dtype, original.shape, original.stride())
        assert torch.equal(copy, original)
        assert original.numel() == 0 or copy.data_ptr() != original.data_ptr()
    assert copied["nested"][0]["x"][1:] == (5, "text", None)
    assert _file_size(copied) == _file_size(state), "what shared memory still does, and padding is not written"
    base.fill_(-1)
    assert copied["a"][2, 3] == 11


def test_the_memory_is_reused_by_the_next_copy(stage):
    first = stage.copy({"a": torch.zeros(1000), "b": torch.zeros(10)})
    where = first["a"].data_ptr()
    second = stage.copy({"a": torch.ones(1000), "b": torch.ones(10)})
    assert second["a"].data_ptr() == where
    assert second["a"].sum() + second["b"].sum() == 1010


def test_reserved_memory_is_used_and_more_is_added_when_it_does_not_do(stage):
    stage.reserve(5000)
    stage.settle()
    (block,) = stage._blocks
    copied = stage.copy({"a": torch.ones(1000), "b": torch.ones(1000)})
    assert copied["a"].sum() + copied["b"].sum() == 2000
    assert stage._blocks[0] is block
    assert len(stage._blocks) == 2


def test_where_memory_is_short_nothing_is_copied(stage, monkeypatch):
    monkeypatch.setattr(staging, "available_bytes", lambda: 1000)
    assert stage.copy({"a": torch.ones(1000)}) is None
    stage.reserve(4000)
    stage.settle()
    assert stage._blocks == []


def test_gradients_and_conjugation_do_not_travel(stage):
    state = {"p": torch.nn.Parameter(torch.ones(2)), "c": torch.ones(2, dtype=torch.cfloat).mul(1j).conj()}
    copied = stage.copy(staging.ordinary(state))
    assert not copied["p"].requires_grad
    assert torch.equal(copied["c"], torch.full((2,), -1j))
    assert not copied["c"].is_conj()


class Driver:
    """In the place of CUDA's runtime, for machines without one; tests/test_device.py asks a real one."""

    def __init__(self, refuses):
        self.refuses = refuses
        self.pinned = {}
        self.device = 0

    @contextmanager
    def on(self, device):
        before, self.device = self.device, device.index
        yield
        self.device = before

    def cudaHostRegister(self, address, size_bytes, flags):  # noqa: N802
        assert (self.device, flags) == (1, 1)
        if not self.refuses:
            self.pinned[address] = size_bytes
        return int(self.refuses)

    def cudaHostUnregister(self, address):  # noqa: N802
        assert self.device == 1, "GPU 0 is another rank's"
        ctypes.string_at(address, self.pinned.pop(address))  # is still mapped


@pytest.mark.parametrize("refuses", [False, True])
def test_memory_for_a_gpu_is_pinned_to_the_byte_and_given_back(stage, monkeypatch, refuses):
    driver = Driver(refuses)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", driver.on)
    stage.reserve(5000, pinned_for=torch.device("cuda:1"))
    stage.settle()
    (block,) = stage._blocks
    assert block.for_gpu
    place = block.take(5000).fill_(7).data_ptr()
    assert driver.pinned == ({} if refuses else {place: 5000})
    del block
    stage.release()
    assert driver.pinned == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_sparse_tensors_are_known_not_to_be_copied_here():
    assert staging.can_stage({"a": torch.ones(1)})
    assert not staging.can_stage({"a": torch.ones(2, 2).to_sparse()})
    assert not staging.can_stage({"a": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})


def test_where_no_thread_can_be_had_the_copy_is_made_all_the_same(stage, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    stage.reserve(4000)
    assert stage.copy({"a": torch.ones(1000)})["a"].sum() == 1000


@pytest.mark.parametrize("error", [OSError, MemoryError, RuntimeError])
def test_memory_that_cannot_be_had_after_all_is_memory_that_is_short(stage, monkeypatch, error):
    told = []

    def refuse(*_):
        raise error("out of memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(threading, "excepthook", told.append)
    stage.reserve(4000)
    stage.settle()
    assert stage.copy({"a": torch.ones(1000)}) is None
    assert told == [], "a thread that only prepares does not fail loudly"


def test_a_background_save_without_memory_for_the_copy_blocks_and_says_so():
    """In a process of its own: a limit on its address space, as `ulimit -v` sets, is for good."""
    code = (
        "import resource, runmgr, torch\n"
        "model = torch.nn.Linear(6000, 6000)\n"
        "with runmgr.start_run('limit') as run:\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), resource.RLIM_INFINITY))\n"
        "    run.restore({'net': model})\n"
        "    run.save({'net': model}, epoch=1, block=False)\n"
        "    print(run.path('latest').exists())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment())
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "memory is short for a second copy of the state" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_users_default_device_does_not_matter():
    model, table = nn.Linear(3, 3), torch.arange(3.0)
    with runmgr.start_run("device") as run:
        torch.set_default_device("meta")
        try:
            run.save({"net": model, "table": table, "empty": table[:0]}, epoch=1, block=False)
            run.wait()
            found = run.restore({"net": model, "table": 0}).values["table"]
        finally:
            torch.set_default_device(None)
    assert found.tolist() == [0, 1, 2]


def test_private_memory_is_handed_over_and_not_copied(stage):
    private, other = torch.ones(100), torch.zeros(10)
    copied = stage.copy({"a": private, "part": private[3:], "b": other}, {staging.identity(private)})
    assert copied["a"].data_ptr() == private.data_ptr()
    assert copied["part"].data_ptr() == private[3:].data_ptr()
    assert copied["b"].data_ptr() != other.data_ptr()
    assert sum(block.size_bytes for block in stage._blocks) < private.nbytes


def test_versions_and_kinds_of_dicts_are_kept(stage):
    state = nn.BatchNorm1d(2).state_dict()
    copied = stage.copy(staging.ordinary({"net": state}))["net"]
    assert type(copied) is OrderedDict
    assert copied._metadata == state._metadata
