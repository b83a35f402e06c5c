"""Each rank keeps its share of an average; together they are, bit for bit, what one rank alone would have."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import run_ranks, values
from sizes import size
from test_averaging import assert_same_bits, copied
from torch import nn

import runmgr
from runmgr.errors import InvalidInput, RunError
from runmgr.worker import agreement, fusing
from runmgr.worker.accumulating import ExponentialAverage, RunningAverage
from runmgr.worker.best import BestAverage
from runmgr.worker.state import beside, local_part

WORLDS = size((4,), (2, 4, 8))
SHARDED_WORLDS = size((2,), (1, *WORLDS))  # with all kinds each
KINDS = {
    "best": lambda model: BestAverage(model, k=2),
    "running": RunningAverage,
    "running float32": lambda model: RunningAverage(model, dtype=torch.float32),
    "exponential": lambda model: ExponentialAverage(model, 0.9, warmup=3),
    "best of exponential": lambda model: BestAverage(ExponentialAverage(model, 0.9), k=2),
}
METRICS = (0.1, 0.4, 0.3, 0.2, 0.5)


class Mixed(nn.Module):
    """Three dtypes, odd sizes, another order in memory, tied weights, an empty tensor, buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(37, 11)
        self.half = nn.Linear(5, 7).to(torch.bfloat16)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(11)
        self.exact = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.turned = nn.Parameter(torch.zeros(4, 9).t())
        self.gaps = nn.Parameter(torch.zeros(6, 8)[:, ::2])
        self.empty = nn.Parameter(torch.zeros(0))
        self.register_buffer("mask", torch.zeros(5, dtype=torch.bool))
        self.tied = nn.Linear(37, 11, bias=False)
        self.tied.weight = self.first.weight


@torch.no_grad()
def shake(model, seed, rank=0):
    """New parameters, the same on all ranks, and buffers that differ, as in a data-parallel training."""
    random = torch.Generator().manual_seed(seed)
    parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64) * 10.0 ** (seed % 3))
        else:
            tensor.copy_(torch.randint(0, 2, tensor.shape, generator=random))
        if key not in parameters:
            tensor.copy_(tensor + rank)


def update(average, metric):
    if isinstance(average, BestAverage):
        if average.faded is not None:
            average.faded.update()
        return average.update(metric)
    return average.update()


def average_all(rank, kind):
    torch.manual_seed(0)
    model = Mixed()
    has_ranks = torch.distributed.is_initialized()
    average = KINDS[kind](nn.parallel.DistributedDataParallel(model) if has_ranks else model)
    for seed, metric in enumerate(METRICS):
        shake(model, seed, rank)
        update(average, metric)
    own = copied(model.state_dict())
    result = copied(average.averaged_state_dict())
    with average.applied():
        applied = copied(model.state_dict())
    assert_same_bits(copied(model.state_dict()), own)
    return result, applied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.scales
@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_gets_the_bits_of_rank_0_alone_though_its_buffers_are_its_own(kind, world):
    alone, applied = average_all(0, kind)
    assert_same_bits(applied, alone)
    for result, applied in values(run_ranks(world, average_all, kind, store="group")):
        assert_same_bits(result, alone)
        assert_same_bits(applied, alone)


def held_bytes(average):
    """What the average's tensors take, each memory once, found by looking at everything that it refers to."""
    found, seen, left = {}, set(), [average]
    model = {local_part(tensor).untyped_storage().data_ptr() for tensor in average.model.state_dict().values()}
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, (nn.Module, type)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            item = local_part(item)
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (dict, list, tuple)) or type(item).__module__.startswith("runmgr"):
            left += gc.get_referents(item)
    return sum(size for address, size in found.items() if address not in model)


def layers(wide, *, sharded):
    """A model whose largest tensors can be cut into eight; as DDP or FSDP2 have it where there is a process group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(wide, 301), nn.BatchNorm1d(301), nn.Linear(301, wide))
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    elif torch.distributed.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    return model


def resident_bytes():
    """The memory of this process that is no file's, as the kernel counts it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.scales
@pytest.mark.parametrize("world", [1, *WORLDS])
def test_a_rank_holds_its_share_of_the_accumulators_and_little_more(world, sharded):
    """By what the average refers to, and by how much the process grew."""
    wide_by = {
        "running": 2,
        "exponential": 1,
        "best": 1,
    }  # float64 sums of float32; the newest member until the next save

    def measure(_rank):
        for kind in wide_by:
            update(KINDS[kind](layers(500, sharded=False)), 1.0)  # what a first update of anything needs
        model = layers(16_000, sharded=sharded)
        parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
        worked_in = fusing._BLOCK_BYTES["cpu"]  # malloc keeps it for the next update, of whatever
        found, kept = {}, {}
        for kind, wide in wide_by.items():
            before = resident_bytes()
            average = kept[kind] = KINDS[kind](model)
            update(average, 1.0)
            found[f"{kind}, held"] = held_bytes(average) / (wide * parameters)
            found[f"{kind}, grown"] = (resident_bytes() - before - worked_in) / (wide * parameters)
        if world > 1:
            kept["best"].averaged_state_dict()
            found["best and its sum"] = held_bytes(kept["best"]) / (4 * parameters)  # and float64 sums, float32 rests
        return found

    for found in values(run_ranks(world, measure, store="group")):
        print(world, {name: round(share * world, 3) for name, share in found.items()})
        assert all(share <= 1.1 / world for share in found.values()), found
        held = [
            share for name, share in found.items() if "grown" not in name
        ]  # malloc may have kept memory from before
        assert all(share > 0.8 / world for share in held), found


def train(rank, kind, epochs, how):
    torch.manual_seed(0)
    model = Mixed()
    average = KINDS[kind](model)
    faded = getattr(average, "faded", None)
    state = {"net": model, "average": average} | ({"faded": faded} if faded else {})
    with runmgr.start_run("x", keep=runmgr.Keep(last=1), **how) as run:
        progress = run.restore(state)
        for epoch in range(progress.epoch, epochs):
            shake(model, epoch, rank)
            update(average, METRICS[epoch])
            if epoch == 1:
                shake(model, epoch, rank)  # the same again: still the member's bits
            run.save(state, epoch=epoch + 1, block=epoch % 2 == 0)
        if epochs == len(METRICS):
            run.save_average(average)
        return run.run_id, str(run.path("average")), copied(average.averaged_state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_goes_on_with_other_numbers_of_ranks(kind):
    whole, _ = average_all(0, kind)
    (run_id, *_), *_ = values(run_ranks(2, train, kind, 2, {}, store="group"))
    (again, *_), *_ = values(run_ranks(4, train, kind, 3, {"run_id": run_id}, store="group"))
    assert again == run_id
    train(0, kind, 4, {"run_id": run_id})
    results = values(run_ranks(3, train, kind, 5, {"run_id": run_id}, store="group"))
    for _, path, result in results:
        assert_same_bits(result, whole)
        saved = torch.load(path, weights_only=True)["net"]
        assert_same_bits(saved, whole)
    objects = os.path.join(os.path.dirname(path), ".runmgr", "checkpoints")
    if kind.startswith("best"):
        assert len(os.listdir(objects)) == 3, "the members, of which one is the newest checkpoint, and the average"


def fully_sharded(rank, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    torch.manual_seed(0)
    model, plain = build(), build()
    fully_shard(model[2], mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    average = KINDS[kind](model)
    states = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    faded = getattr(average, "faded", None)
    state = {"net": model, "average": average} | ({"faded": faded} if faded else {})
    with runmgr.start_run("sharded", keep=runmgr.Keep(last=1)) as run:
        for epoch, metric in enumerate(METRICS):
            loss = model(torch.randn(4, 9) + rank).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update(average, metric)
            if epoch != 3:
                run.save(state, epoch=epoch + 1)
            states.append(whole(model.state_dict()))
        own = whole(model.state_dict())
        inputs = torch.randn(4, 9)
        with average.applied():
            applied = whole(model.state_dict())
            model.eval()
            answer = model(inputs)
        assert_same_bits(whole(model.state_dict()), own)
        path = run.save_average(average)
        torch.distributed.barrier()
        plain.load_state_dict(applied)
        assert torch.allclose(plain.eval()(inputs), answer, atol=1e-6), "the forward pass used the average"
        return states, whole(average.averaged_state_dict()), applied, torch.load(path, weights_only=True)["net"]


def whole(state):
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for key, value in state.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.scales
@pytest.mark.parametrize("world", SHARDED_WORLDS)
def test_a_sharded_model_is_averaged_in_its_shards_to_the_bits_of_a_whole_one(kind, world):
    found = values(run_ranks(world, fully_sharded, kind, store="group"))
    states = found[0][0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    average = KINDS[kind](model)
    for state, metric in zip(states, METRICS, strict=True):
        model.load_state_dict(state)
        update(average, metric)
    expected = copied(average.averaged_state_dict())
    for _, result, applied, saved in found:
        for one in (result, applied, saved):
            assert_same_bits(one, expected)


def save_before_the_first_update(rank, kind):
    found = {}
    with runmgr.start_run("early", timeout_s=20) as run:
        for name in ("saved", "restored"):
            model = Mixed()
            average = KINDS[kind](model)
            state = {"net": model, "average": average} | ({"faded": average.faded} if hasattr(average, "faded") else {})
            state = {key: value for key, value in state.items() if value is not None}
            run.restore(state)
            if name == "saved":
                run.save(state, epoch=1)
            shake(model, 0, rank)
            update(average, 1.0)
            found[name] = copied(average.averaged_state_dict())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_saved_and_restored_before_its_first_update(kind):
    for found in values(run_ranks(2, save_before_the_first_update, kind, store="group")):
        assert_same_bits(found["saved"], found["restored"])


@pytest.mark.parametrize("differs", ["updates", "dtype"])
def test_ranks_whose_averages_differ_get_an_error_that_says_so(differs):
    def average(rank):
        dtype = torch.float64 if differs == "updates" or not rank else torch.float32
        average = RunningAverage(nn.Linear(3, 3), dtype=dtype)
        for _ in range(1 + rank * (differs == "updates")):
            average.update()
        average.averaged_state_dict()

    for outcome in run_ranks(2, average, store="group"):
        assert type(outcome.error) is InvalidInput
        assert "equally often" in str(outcome.error)


def test_an_average_that_was_begun_before_the_process_group_says_so(monkeypatch):
    average = RunningAverage(nn.Linear(3, 3))
    average.update()
    monkeypatch.setattr(agreement, "current_ranks", lambda: average._source.ranks._replace(rank=1, world_size=2))
    with pytest.raises(RunError, match="make averages after"):
        average.outline()


def test_a_shard_that_is_put_beside_stays_on_its_own_device():
    """As the host's memory is where FSDP2 offloads to it, or a GPU has no more room. "meta" stands for such a device here."""

    def put(rank):
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
        del DTensor.from_local  # it would move a shard to a GPU that the ranks share it on
        found = beside(sharded, local_part(sharded).to("meta"))
        return local_part(found).device.type, tuple(found.shape), tuple(local_part(found).shape)

    assert values(run_ranks(2, put, store="group")) == [("meta", (4,), (2,))] * 2


def test_what_is_not_finite_on_any_rank_enters_on_none():
    def average(rank):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        average = BestAverage(model, k=3)
        first = average.update(1.0)
        with torch.no_grad():
            model.weight[-1, -1] = float("nan")  # on the last rank's stretch
        second = average.update(2.0)
        return first, second, len(average.members), average.averaged_state_dict()["weight"].isfinite().all().item()

    assert values(run_ranks(2, average, store="group")) == [(True, False, 1, True)] * 2


def train_or_die(rank, kind, dies_at, dies_saved):
    torch.manual_seed(0)
    model = Mixed()
    average = KINDS[kind](model)
    faded = getattr(average, "faded", None)
    state = {"net": model, "average": average} | ({"faded": faded} if faded else {})
    with runmgr.start_run("x", keep=runmgr.Keep(last=1), resume="latest") as run:
        progress = run.restore(state)
        for epoch in range(progress.epoch, len(METRICS)):
            shake(model, epoch, rank)
            update(average, METRICS[epoch])
            if epoch == dies_at and not dies_saved:
                os.kill(os.getpid(), signal.SIGKILL)
            average.averaged_state_dict()
            run.save(state, epoch=epoch + 1)
            if epoch == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
        run.save_average(average)
        return str(run.path("average")), progress.epoch


@pytest.mark.parametrize(("world", "saved"), [(1, False), (2, True)], ids=["1, before the save", "2, after it"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_epoch_an_average_ends_with_the_same_bits(kind, world, saved):
    expected, _ = average_all(0, kind)
    for epoch in range(len(METRICS)):
        died = run_ranks(world, train_or_die, kind, epoch, saved, store="group")
        assert signal.SIGKILL in [outcome.signal for outcome in died]
        assert all(outcome.signal or outcome.error for outcome in died), (
            "with rank 0 goes the store, so another may fail"
        )
    for path, started_at in values(run_ranks(world, train_or_die, kind, None, saved, store="group")):
        assert started_at == len(METRICS) - (not saved)
        assert_same_bits(torch.load(path, weights_only=True)["net"], expected)
