"""Saves in the background, failing saves, what a checkpoint may hold, and what is read back."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from processes import REPOSITORY, clean_environment, run_ranks, values
from sizes import size
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from worker.faults import fill, small_disk

import runmgr
from runmgr.errors import RankFailed
from runmgr.worker import writing

SAVES = size(200, 1000)  # in a row


def _load(run, name="latest"):
    return torch.load(run.path(name), weights_only=True)


def _slow_writes(monkeypatch, seconds=0.2):
    """Let every write of a checkpoint take a while, so that it is still going on when the test looks."""
    from runmgr.disk import atomic

    original = atomic.Stream.write

    def write(self, content):
        time.sleep(seconds / 10)
        return original(self, content)

    monkeypatch.setattr(atomic.Stream, "write", write)


def test_a_background_save_holds_the_state_of_the_call_and_is_done_after_wait(monkeypatch):
    _slow_writes(monkeypatch)
    model = nn.Linear(4, 4)
    with runmgr.start_run("behind", monitor="acc") as run:
        run.restore({"net": model})
        before = model.weight.detach().clone()
        handle = run.save({"net": model}, epoch=1, metrics={"acc": 1}, block=False)
        with torch.no_grad():
            model.weight.add_(1)
        assert not handle.is_done
        assert not run.path("latest").exists()
        run.wait()
        assert handle.is_done
        assert handle.checkpoint.epoch == 1
        assert torch.equal(_load(run)["net"]["weight"], before)
        assert run.path("latest").samefile(run.path("best"))


def test_one_save_is_in_flight_the_next_one_waits_and_leaving_ends_the_last(monkeypatch):
    _slow_writes(monkeypatch)
    model = nn.Linear(4, 4)
    with runmgr.start_run("behind", keep=runmgr.Keep(last=None)) as run:
        for epoch in range(1, 5):
            with torch.no_grad():
                model.weight.fill_(epoch)
            run.save({"net": model}, epoch=epoch, block=False)
            assert sum(thread.name == "runmgr-save" for thread in threading.enumerate()) == 1
    for epoch in range(1, 5):
        assert _load(run, f"ckpt_epoch_{epoch}.pth")["net"]["weight"].unique().tolist() == [epoch]


def test_a_background_save_and_a_blocking_one_write_the_same_file(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias = model[1].bias  # tied
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"net": model, "optimizer": optimizer, "extra": {"a": [1, 2.5, "x"], "t": torch.arange(6).view(2, 3).t()}}
    with runmgr.start_run("same", keep=runmgr.Keep(last=None)) as run:
        sizes = []
        for epoch, block in ((1, True), (2, False), (3, True)):
            run.save(state, epoch=epoch, block=block)
            run.wait()
            sizes.append(os.path.getsize(run.path("latest")))
        one, two = _load(run, "ckpt_epoch_1.pth"), _load(run, "ckpt_epoch_2.pth")
    assert sizes[0] == sizes[1] == sizes[2]
    assert torch.equal(one["net"]["0.weight"], two["net"]["0.weight"])
    assert str(one["optimizer"]) == str(two["optimizer"])
    assert torch.equal(one["extra"]["t"], two["extra"]["t"])
    assert two["net"]["0.bias"].data_ptr() == two["net"]["1.bias"].data_ptr()


def test_a_best_average_shares_the_bytes_of_background_saves_too():
    model = nn.Linear(2, 2)
    average = runmgr.BestAverage(model, k=2)
    with runmgr.start_run("members") as run:
        for epoch in range(1, 4):
            with torch.no_grad():
                model.weight.fill_(epoch)
            average.update(float(epoch))
            run.save({"net": model, "average": average}, epoch=epoch, block=False)
        run.wait()
        assert [member.weights for member in average.members] == [None, None]
        assert average.averaged_state_dict()["weight"].unique().tolist() == [2.5]
        run.save_average(average)
    assert _load(run, "average")["net"]["weight"].unique().tolist() == [2.5]


@pytest.mark.needs("root")
@pytest.mark.needs("mkfs.ext4")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("asks", ["save", "wait", "should_stop", "finish"])
def test_the_error_of_a_background_save_comes_with_the_next_question(tmp_path, asks, kind):
    model = nn.Linear(100, 100)
    with small_disk(tmp_path / "disk", 4 << 20, kind) as disk:
        run = runmgr.start_run("full", ckpt_root_dir=disk)
        run.save({"net": model}, epoch=1)
        run._saver._check_space = lambda _: fill(disk)  # full after it was asked: the write itself fails
        run.save({"net": model}, epoch=2, block=False)
        run._saver._in_flight.handle.wait()
        questions = {
            "save": lambda: run.save({"net": model}, epoch=3), "wait": run.wait, "should_stop": run.should_stop,
            "finish": run.finish,
        }  # fmt: skip
        if asks == "finish":
            (disk / "ballast").unlink()  # so that it can be recorded
        with pytest.raises((RankFailed, OSError), match="No space left"):
            questions[asks]()
        (disk / "ballast").unlink(missing_ok=True)
        run._saver._check_space = lambda _: None
        if asks == "finish":
            record = json.loads((run.run_dir / "run.json").read_text())
            assert record["status"] == "failed"
            assert "No space left" in record["error"]["message"]
        else:
            assert _load(run)["epoch"] == 1
            run.save({"net": model}, epoch=4)
            assert _load(run)["epoch"] == 4
            run.finish()


@pytest.mark.needs("root")
@pytest.mark.needs("mkfs.ext4")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("block", [True, False])
def test_with_warn_training_goes_on_until_the_third_failure_in_a_row(tmp_path, block, kind):
    model = nn.Linear(300, 300)
    with small_disk(tmp_path / "disk", 4 << 20, kind) as disk:
        with runmgr.start_run("full", ckpt_root_dir=disk, on_save_error="warn") as run:
            run.save({"net": model}, epoch=1)
            (disk / "room").write_bytes(b"0" * 150_000)
            ballast = fill(disk)
            (disk / "room").unlink()  # enough for records, not for a checkpoint
            for epoch in (2, 3):
                run.save({"net": model}, epoch=epoch, block=block)
                run.wait()
            record = json.loads((run.run_dir / "run.json").read_text())
            assert "No space left" in record["save_error"]["error"]
            assert record["save_error"]["in_a_row"] == 2
            assert _load(run)["epoch"] == 1
            ballast.unlink()
            run.save({"net": model}, epoch=4, block=block)
            run.wait()
            assert json.loads((run.run_dir / "run.json").read_text())["save_error"] is None
            assert _load(run)["epoch"] == 4
            fill(disk)
            for epoch in (5, 6):
                run.save({"net": model}, epoch=epoch, block=block)
                run.wait()
            with pytest.raises((RankFailed, OSError), match="No space left"):  # noqa: PT012  # either of the two
                run.save({"net": model}, epoch=7, block=block)
                run.wait()
            (disk / "ballast").unlink()
        assert "a save failed" in next(run.run_dir.glob("log_*.txt")).read_text()


@pytest.mark.needs("root")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's own thread
def test_a_full_disk_costs_scalars_and_log_lines_and_never_the_training(tmp_path, capfd, caplog):
    model = nn.Linear(64, 64)
    with small_disk(tmp_path / "disk", 3 << 20) as disk:
        with runmgr.start_run("full", ckpt_root_dir=disk, on_save_error="warn") as run:
            run.log_scalars({"loss": 1}, step=0)
            run.save({"net": model}, epoch=1)
            ballast = fill(disk)
            for epoch in (2, 3):
                for step in range(300):
                    run.log_scalars({"loss": 1}, step=300 * epoch + step)
                    run.logger.info("a line that has no room on the disk " * 9)
                run.save({"net": model}, epoch=epoch)
            ballast.unlink()
            run.save({"net": model}, epoch=4)
            run.log_scalars({"loss": 1}, step=1200)
        assert _load(run)["epoch"] == 4
        events = EventAccumulator(str(run.run_dir)).Reload().Scalars("loss")
        assert (events[0].step, events[-1].step) == (0, 1200)
    said = capfd.readouterr().err
    assert "Logging error" not in said
    assert said.count("cannot be written: No space left on device") == 1
    assert 1 <= caplog.text.count("scalars are lost until the next save") <= 3


def test_without_a_thread_to_be_had_a_background_save_is_a_blocking_one(monkeypatch):
    """No real limit: those on threads do not bind root, and cannot be taken back."""

    def start(thread, original=threading.Thread.start):
        if thread.name == "runmgr-save":
            raise RuntimeError("can't start new thread")
        original(thread)

    with runmgr.start_run("threads") as run:
        monkeypatch.setattr(threading.Thread, "start", start)
        handle = run.save({"x": torch.ones(3)}, epoch=1, block=False)
        assert handle.is_done
        assert _load(run)["epoch"] == handle.checkpoint.epoch == 1
    assert "can't start new thread, so save(block=False) waits" in next(run.run_dir.glob("log_*.txt")).read_text()


@pytest.mark.parametrize("name", ["latest", "path"])
def test_load_notices_damage_and_takes_files_without_checksums(tmp_path, name):
    with runmgr.start_run("load") as run:
        run.save({"x": torch.ones(1000)}, epoch=1)
        path = run.path("latest")
        given = name if name == "latest" else path
        assert run.load(given)["epoch"] == 1
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[content.find(torch.ones(100).numpy().tobytes())] ^= 1
        path.write_bytes(content)
        with pytest.raises(runmgr.CheckpointCorrupt, match=r"ckpt_latest.pth is damaged: the record .* CRC-32"):
            run.load(given)
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"x": 1}, tmp_path / "foreign.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        assert run.load(tmp_path / "foreign.pth") == {"x": 1}


def test_the_option_without_crcs_is_back_before_anything_is_pickled():
    """It is the whole process's in older versions of torch, where other threads may be saving."""
    seen = []

    class Watched:
        def __reduce__(self):
            seen.append(torch.serialization.get_crc32_options())
            return collections.OrderedDict, ()

    with runmgr.start_run("option") as run:
        writing.write_file({"x": Watched(), "y": torch.ones(10)}, run.run_dir / "file.pth")
    assert seen == [True]
    assert torch.serialization.get_crc32_options()
    with zipfile.ZipFile(run.run_dir / "file.pth") as archive:
        assert archive.testzip() is None
        assert all(entry.CRC for entry in archive.infolist())


_CHILD = """
import os, sys, time, signal, threading, torch, runmgr
from runmgr.disk import atomic
original = atomic.Stream.write
def write(self, content):
    print("writing", flush=True)
    time.sleep(0.02)
    return original(self, content)
# CPython ends with status 1 instead of SIGINT's where another thread imports at the wrong moment, as this one's does
run = runmgr.start_run("child", system_metrics_every_s=None)
model = torch.nn.Linear(50, 50)
run.save({"net": model}, epoch=1)
atomic.Stream.write = write
run.save({"net": model}, epoch=2, block=False)
"""


@pytest.mark.parametrize(
    ("ending", "code", "epochs"),
    [("", 0, {2}), ("raise ValueError('x')", 1, {2}), ("time.sleep(30)", -signal.SIGTERM, {1, 2}),
     ("time.sleep(30)", -signal.SIGINT, {1, 2}),
     ("run.wait(); time.sleep(30)", -signal.SIGINT, {1, 2})],
)  # fmt: skip
def test_whatever_ends_the_process_the_new_or_the_old_checkpoint_is_whole(root, ending, code, epochs):
    environ = clean_environment(RUNMGR_CKPT_ROOT_DIR=str(root), PYTHONPATH=str(REPOSITORY))
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD + ending], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "writing\n"
        if code < 0:
            child.send_signal(-code)
        _, err = child.communicate(timeout=240)
    assert child.returncode in {code, 130 if code == -signal.SIGINT else code}, err
    (run,) = runmgr.list_runs("child")
    saved = torch.load(run.path / "ckpt_latest.pth", weights_only=True)
    assert saved["epoch"] in epochs
    if not ending or "ValueError" in ending or code == -signal.SIGINT:
        assert saved["epoch"] == 2, "what can be waited for is"
    with runmgr.start_run("child", run_id=run.run_id) as again:
        assert again.restore({"net": nn.Linear(50, 50)}).epoch == saved["epoch"]
    assert not list(run.path.rglob("*.tmp-*"))


@pytest.mark.scales
def test_hundreds_of_saves_leave_no_thread_descriptor_or_temporary():
    model = nn.Linear(2, 2)
    with runmgr.start_run("many", system_metrics_every_s=None) as run:
        run.save({"net": model}, epoch=1, block=False)
        run.wait()
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for step in range(SAVES):
            run.save({"net": model}, step=step, block=step % 2 == 0)
        run.wait()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert threading.active_count() == threads
        files = [path for path in run.run_dir.rglob("*") if path.is_file()]
        assert not [path for path in files if ".tmp-" in path.name]
        assert len(files) < 12


class _Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class _Facts:
    name: str
    folder: pathlib.Path


def test_metadata_is_made_plain_and_what_cannot_be_is_named():
    numpy = pytest.importorskip("numpy")
    state = {
        "facts": _Facts("x", pathlib.Path("/a")),
        "colour": _Colour.RED,
        "number": numpy.float32(1.5),
        "t": (1, {"a": numpy.int64(3)}),
    }
    with runmgr.start_run("plain") as run:
        run.save(state, epoch=1)
        saved = _load(run)
        with pytest.raises(runmgr.InvalidInput, match=r"state\['bad\.inner\[1\]'\] is a builtins.object"):
            run.save({"bad": {"inner": [1, object()]}}, epoch=2)
    assert saved["facts"] == {"name": "x", "folder": "/a"}
    assert (saved["number"], saved["t"]) == (1.5, (1, {"a": 3}))


class _Loader:
    def __init__(self, position):
        self.position = position

    def state_dict(self):
        return {"position": self.position, "noise": torch.full((2,), float(self.position))}

    def load_state_dict(self, state):
        assert state["noise"].tolist() == [state["position"]] * 2
        self.position = state["position"]


def _save_and_restore_own(rank, root, world_size):
    with runmgr.start_run("own", ckpt_root_dir=root, resume="latest") as run:
        loader, seen = _Loader(-1), []
        state = {"loader": runmgr.per_rank(loader), "shard": runmgr.per_rank(f"shard {rank}"), "seen": seen}
        progress = run.restore(state)
        found = loader.position, progress.values.get("shard")
        loader.position = 10 + rank
        run.save(state, epoch=progress.epoch + 1, block=False)
        run.wait()
        return found


def test_each_rank_gets_its_own_part_back_and_a_new_rank_keeps_what_it_has(root):
    assert values(run_ranks(2, _save_and_restore_own, root, 2)) == [(-1, None)] * 2
    assert values(run_ranks(3, _save_and_restore_own, root, 3)) == [(10, "shard 0"), (11, "shard 1"), (-1, None)]
    assert values(run_ranks(1, _save_and_restore_own, root, 1)) == [(10, "shard 0")]


def _sharded(rank, root, wrap):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    if wrap == "fsdp":
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    with runmgr.start_run("sharded", ckpt_root_dir=root, resume="latest") as run:
        progress = run.restore({"net": model, "optimizer": optimizer})
        if progress.epoch == 0:
            for _ in range(3):
                model(torch.randn(6, 7)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        run.save({"net": model, "optimizer": optimizer}, epoch=progress.epoch + 1, block=progress.epoch % 2 == 0)
        run.wait()
        saved = run.load("latest")
        model(torch.randn(6, 7)).sum().backward()
        optimizer.step()  # the optimizer can go on with what it got
    return saved["net"], saved["optimizer"]


def test_a_sharded_model_is_saved_whole_and_loads_at_any_world_size(root):
    saved = None
    for world_size, wrap in ((4, "fsdp"), (1, "plain"), (2, "fsdp"), (4, "ddp"), (3, "fsdp")):
        store = "none" if world_size == 1 else "group"
        outcomes = values(run_ranks(world_size, _sharded, root, wrap, store=store))
        net, optimizer = outcomes[0]
        if saved is not None:
            assert net.keys() == saved[0].keys()
            assert all(torch.equal(net[key], saved[0][key]) for key in net), wrap
            for number, entry in optimizer["state"].items():
                assert all(torch.equal(entry[key], saved[1]["state"][number][key]) for key in entry), wrap
            assert optimizer["param_groups"] == saved[1]["param_groups"]
            assert optimizer["param_groups"][0]["betas"] == (0.8, 0.9)
        assert all(type(tensor) is torch.Tensor for tensor in net.values())
        saved = net, optimizer


def test_what_was_restored_does_not_depend_on_the_file_any_more():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"net": model, "optimizer": optimizer, "table": torch.arange(5.0)}
    with runmgr.start_run("mapped") as run:
        run.save(state, epoch=1)
    with runmgr.start_run("mapped", run_id=run.run_id) as again:
        progress = again.restore(state)
        with open("/proc/self/maps") as maps:
            before = maps.read()
    assert progress.values["table"].tolist() == [0, 1, 2, 3, 4]
    buffers = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    ranges = [
        tuple(int(part, 16) for part in line.split()[0].split("-")) for line in before.splitlines() if ".pth" in line
    ]
    for tensor in [*model.parameters(), *buffers, progress.values["table"]]:
        assert not any(start <= tensor.data_ptr() < end for start, end in ranges)
