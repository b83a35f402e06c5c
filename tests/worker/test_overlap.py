"""An update that runs beside the training ends with the bits of one that does not, whoever reads and writes meanwhile.

With CUDA a slow kernel keeps the other stream busy; without it stand-ins do its work as late as they may.
"""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from late_stream import Streams
from processes import run_ranks, values
from test_averaging import assert_same_bits, copied
from test_sharded_averages import layers, whole
from torch import nn

import runmgr
from runmgr.errors import InvalidInput
from runmgr.worker import overlap
from runmgr.worker.accumulating import ExponentialAverage, RunningAverage
from runmgr.worker.best import BestAverage

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SLEEP_CYCLES = 200_000_000  # about a tenth of a second
KINDS = pytest.mark.parametrize(
    "kind",
    [RunningAverage, lambda model, **more: ExponentialAverage(model, 0.9, **more)],
    ids=["running", "exponential"],
)


class Beside:
    """A device whose other stream is slow."""

    def __init__(self, device, streams=None):
        self.device = torch.device(device)
        self.streams = streams

    def update(self, average):
        """Update, and see that it has not been made yet."""
        if self.streams is None:
            stream = overlap._stream(self.device)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES)
            average.update()
            assert not stream.query(), "the host did not wait"
        else:
            before = self.streams.left
            average.update()
            assert self.streams.left == before + 1


@pytest.fixture(params=["late stand-in", pytest.param("cuda", marks=NEEDS_CUDA)])
def beside(request, monkeypatch):
    if request.param == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        for kind in (RunningAverage, ExponentialAverage):
            Training(kind, device=device).steps()  # loading a kernel waits for all streams
        return Beside(device)
    return Beside("cpu", Streams(monkeypatch))


class Training:
    """A model, its optimizer, and an average; the same numbers at each of `steps`, whatever else happens."""

    def __init__(self, kind, beside=None, device="cpu"):
        torch.manual_seed(0)
        self.beside = beside
        self.device = device if beside is None else beside.device
        self.model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        more = {} if beside is None else {"overlap_with": self.optimizer}
        self.average = kind(self.model, **more)
        self.random = torch.Generator().manual_seed(1)

    def step(self):
        self.model(torch.randn(4, 6, generator=self.random).to(self.device))  # moves BatchNorm's buffers
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.random).to(self.device)
        self.optimizer.step()

    def update(self):
        if self.beside is None:
            self.average.update()
        else:
            self.beside.update(self.average)

    def steps(self, count=4):
        for _ in range(count):
            self.step()
            self.update()
        return self


def pair(kind, beside):
    """The same training twice, with overlap and without, up to right after an update."""
    return Training(kind, beside).steps(), Training(kind, device=beside.device).steps()


@KINDS
def test_steps_wait_and_the_bits_are_the_same(kind, beside):
    late, plain = pair(kind, beside)
    late.step()
    plain.step()
    assert_same_bits(copied(late.model.state_dict()), copied(plain.model.state_dict()))
    assert_same_bits(late.average.averaged_state_dict(), plain.average.averaged_state_dict())


def test_the_device_is_asked_in_this_order(monkeypatch):
    streams = Streams(monkeypatch)
    training = Training(RunningAverage, Beside("cpu", streams)).steps(2)
    streams.told.clear()
    training.optimizer.register_step_pre_hook(lambda *_: streams.told.append("step"))
    training.step()
    training.update()
    training.step()
    assert streams.told == [
        "the current stream waits", "step",
        "the other stream waits", "update",
        "the current stream waits", "step",
    ]  # fmt: skip


def applied(training):
    with training.average.applied():
        return copied(training.model.state_dict())


def best_of(training):
    best = BestAverage(training.average, k=2)
    best.update(1.0)
    training.step()
    return best.averaged_state_dict()


def restored(training):
    state = {"net": training.model, "average": training.average}
    with runmgr.start_run("x", resume="never") as run:
        run.save(state, epoch=1)
        training.steps(1)
        run.restore(state)
        training.steps(1)
        path = run.save_average(training.average)
    return torch.load(path, weights_only=True)["net"]


def another_applied(training):
    best = BestAverage(training.model)
    best.update(1.0)
    training.steps(1)
    with best.applied():
        training.update()
    return training.average.averaged_state_dict()


def loaded(training):
    before = copied(training.model.state_dict())
    training.steps(1)
    training.model.load_state_dict({key: tensor + 1 for key, tensor in before.items()})
    return training.average.averaged_state_dict()


def moved(training):
    training.model.load_state_dict(copied(training.model.state_dict()), assign=True)
    training.average.update()
    return training.average.averaged_state_dict()


def deeply_copied(training):
    model, average = copy.deepcopy((training.model, training.average))
    average.update()
    with torch.no_grad():
        model[0].weight.zero_()  # nobody waits here
    return average.averaged_state_dict()


def without_its_optimizer(training):
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.5)
    gc.collect()
    training.average.update()
    training.step()
    return training.average.averaged_state_dict()


def changed_by_hand(training):
    """As a target network is, and from now on, in another place, so is a parameter that the optimizer had until now."""
    training.optimizer.param_groups[0]["params"].pop(0)
    weight = training.model[0].weight
    weight.data = weight.data + 1
    training.average.update()
    with torch.no_grad():
        weight.zero_()
    return training.average.averaged_state_dict()


READERS = [
    lambda training: training.average.averaged_state_dict(),
    lambda training: {"x": training.average.state_dict()[training.average._name]["2.weight"].clone()},
    applied, best_of, restored, another_applied, loaded, moved, deeply_copied, without_its_optimizer, changed_by_hand,
]  # fmt: skip


@pytest.mark.parametrize("result", READERS)
def test_who_reads_or_writes_after_an_update_waits_for_it(result, beside):
    late, plain = pair(lambda model, **more: ExponentialAverage(model, 0.9, **more), beside)
    assert_same_bits(result(late), result(plain))


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_each_rank_updates_its_share_beside_the_training(sharded):
    def train(_rank):
        beside = Beside("cpu", Streams(pytest.MonkeyPatch()))
        torch.manual_seed(0)
        model = layers(8, sharded=sharded)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        late, plain = (ExponentialAverage(model, 0.9, **more) for more in ({"overlap_with": optimizer}, {}))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            plain.update()
            beside.update(late)
        with late.applied(), torch.no_grad():
            applied = copied(whole(model.state_dict()))
        return applied, copied(whole(plain.averaged_state_dict()))

    for applied, expected in values(run_ranks(2, train, store="group")):
        assert_same_bits({key.removeprefix("module."): tensor for key, tensor in applied.items()}, expected)


def test_memory_that_the_other_stream_uses_is_recorded_there(monkeypatch):
    streams = Streams(monkeypatch)
    training = Training(RunningAverage, Beside("cpu", streams)).steps(2)
    parts = {tensor.untyped_storage().data_ptr() for tensor in training.average.parts()}
    parameters = {tensor.untyped_storage().data_ptr() for tensor in training.model.parameters()}
    assert parameters <= streams.recorded
    assert parts & streams.recorded
    assert not {tensor.untyped_storage().data_ptr() for tensor in training.model.buffers()} & streams.recorded


@KINDS
def test_on_a_cpu_the_option_changes_nothing_and_its_hooks_go_with_the_average(kind):
    training, plain = Training(kind), Training(kind)
    average = kind(training.model, overlap_with=training.optimizer)
    hooks = training.optimizer._optimizer_step_pre_hooks, training.model._load_state_dict_pre_hooks
    assert [len(kept) for kept in hooks] == [1, 1]
    for _ in range(4):
        training.step()
        average.update()
    plain.steps()
    assert_same_bits(average.averaged_state_dict(), plain.average.averaged_state_dict())
    assert not overlap._streams
    del average
    gc.collect()
    assert [len(kept) for kept in hooks] == [0, 0]


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: it has the inner one's parameters, and a step that calls no hooks."""

    def __init__(self, inner):
        self.optimizer = inner

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_what_would_not_wait_is_refused():
    model = nn.Linear(3, 3)
    for wrong in (model, "adam", Wrapper(torch.optim.SGD(model.parameters()))):
        with pytest.raises(InvalidInput, match="whose step calls no hooks"):
            RunningAverage(model, overlap_with=wrong)
    assert not model._load_state_dict_pre_hooks


def test_a_model_whose_average_overlaps_can_be_pickled():
    model = nn.Linear(3, 3)
    average = RunningAverage(model, overlap_with=torch.optim.SGD(model.parameters()))
    assert_same_bits(pickle.loads(pickle.dumps(model)).state_dict(), copied(model.state_dict()))
    average.update()


@pytest.mark.long  # Dynamo takes ten seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_the_step_of_an_optimizer_that_an_average_overlaps_with_can_be_compiled():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = RunningAverage(model, overlap_with=optimizer)
    average.update()
    model(torch.ones(3)).sum().backward()
    before = copied(model.state_dict())
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(model.weight, before["weight"])
    assert_same_bits(average.averaged_state_dict(), before)
