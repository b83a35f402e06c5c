"""What averages are after many updates, against exact references: math.fsum, and the recurrences themselves."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from test_averaging import assert_same_bits, assert_within_one_ulp, copied
from torch import nn

from runmgr.errors import InvalidInput
from runmgr.worker import fusing
from runmgr.worker.accumulating import ExponentialAverage, RunningAverage
from runmgr.worker.best import BestAverage

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ELEMENTS = 64


def model_of(dtype, elements=ELEMENTS):
    return nn.ParameterDict({"w": nn.Parameter(torch.zeros(elements, dtype=dtype))})


def states(dtype, count, elements=ELEMENTS, *, apart=1e6):
    """States whose sizes lie up to `apart` from each other, the last twenty the smallest, with both signs."""
    random = torch.Generator().manual_seed(0)
    greatest = 6e4 / 8 if dtype == torch.float16 else 1e3  # float16 ends at 65504
    for number in range(count):
        size = greatest * (apart ** -((number % 7) / 6) if number < count - 20 else 1 / apart)
        yield (torch.randn(elements, generator=random, dtype=torch.float64) * size).to(dtype)


def exact_mean(tensors):
    columns = zip(*(tensor.double().tolist() for tensor in tensors), strict=True)
    return torch.tensor([math.fsum(column) / len(tensors) for column in columns], dtype=torch.float64)


@DTYPES
def test_a_running_mean_of_ten_thousand_states_is_the_exact_one_to_one_ulp(dtype):
    model = model_of(dtype)
    average = RunningAverage(model)
    seen = list(states(dtype, 10_000))
    for state in seen:
        model["w"].data.copy_(state)
        average.update()
    assert_within_one_ulp(average.averaged_state_dict(), {"w": exact_mean(seen)})


@DTYPES
def test_a_running_mean_with_float32_sums_is_that_sum_bit_for_bit_and_goes_on_from_float64_ones(dtype):
    model = model_of(dtype)
    average, wide = RunningAverage(model, dtype=torch.float32), RunningAverage(model)
    total = torch.zeros(ELEMENTS)
    for state in states(dtype, 100):
        model["w"].data.copy_(state)
        average.update()
        wide.update()
        total += state
    assert average.state_dict()["sums"]["w"].dtype == torch.float32
    assert_same_bits(average.averaged_state_dict(), {"w": (total / 100).to(dtype)})
    average.load_state_dict(wide.state_dict())
    assert_same_bits(average.state_dict()["sums"], {"w": wide.state_dict()["sums"]["w"].float()})


def test_sums_are_never_narrower_than_the_weights():
    model = nn.ParameterDict(
        {
            name: nn.Parameter(torch.zeros(1, dtype=getattr(torch, name)))
            for name in ("float64", "complex64", "float8_e4m3fn")
        }
    )
    average = RunningAverage(model, dtype=torch.float32)
    average.update()
    assert {str(part.dtype) for part in average.parts()} == {"torch.float64", "torch.complex64", "torch.float32"}
    with pytest.raises(InvalidInput, match=r"dtype=torch.float16.*must be"):
        RunningAverage(model, dtype=torch.float16)


@DTYPES
def test_the_sum_of_the_best_has_lost_nothing_after_a_thousand_evictions(dtype):
    model = model_of(dtype, 8192)
    average = BestAverage(model, k=10)
    seen = list(states(dtype, 1_010, 8192))
    for number, state in enumerate(seen):
        model["w"].data.copy_(state)
        assert average.update(float(number))
        if number == 9:
            average.averaged_state_dict()
            kept = average._sum
    found = average.averaged_state_dict()
    assert average._sum is kept, "it was changed a thousand times, never made anew"
    assert_within_one_ulp(found, {"w": exact_mean(seen[-10:])})
    average._sum = None
    assert_same_bits(average.averaged_state_dict(), found)


@DTYPES
def test_an_exponential_average_is_the_float32_recurrence_bit_for_bit_and_near_the_float64_one(dtype):
    model = model_of(dtype)
    average = ExponentialAverage(model, 0.999)
    single, double = torch.zeros(ELEMENTS), torch.zeros(ELEMENTS, dtype=torch.float64)
    for state in states(dtype, 10_000):
        model["w"].data.copy_(state)
        average.update()
        single.lerp_(state.float(), 1 - 0.999)
        double.lerp_(state.double(), 1 - 0.999)
    assert_same_bits(average.averaged_state_dict(), {"w": single.to(dtype)})
    error = ((single - double).abs() / double.abs().max()).max().item()
    print(f"{dtype}: {error:.1e} of the greatest element from the float64 recurrence")
    assert error < 2**-24 / (1 - 0.999), "one rounding at each update, which is forgotten as the states are"


def test_the_warm_up_is_the_formula_of_tensorflow():
    model = model_of(torch.float32)
    average = ExponentialAverage(model, 0.8, warmup=10)
    expected = torch.zeros(ELEMENTS)
    for number, state in enumerate(states(torch.float32, 60)):
        model["w"].data.copy_(state)
        average.update()
        expected.lerp_(state, 1 - min(0.8, (1 + number) / (10 + number)))
    assert_same_bits(average.averaged_state_dict(), {"w": expected})
    with pytest.raises(InvalidInput, match="warmup=-1"):
        ExponentialAverage(model, warmup=-1)


def test_sums_of_finite_weights_that_are_no_finite_number_do_not_keep_them_out():
    model = nn.ParameterDict({"w": nn.Parameter(torch.full((70_000,), 60_000.0, dtype=torch.float16))})
    average = BestAverage(model)
    assert average.update(1.0)
    model["w"].data[-1] = math.inf
    model["w"].data[-2] = -math.inf
    assert not average.update(2.0)


def test_memory_of_the_model_that_moves_is_followed():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = RunningAverage(model)
    total = {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}
    for number in range(3):
        model.load_state_dict({key: tensor + number for key, tensor in copied(model.state_dict()).items()}, assign=True)
        average.update()
        total = {key: total[key] + tensor for key, tensor in model.state_dict().items()}
    found = average.averaged_state_dict()
    assert all(torch.allclose(found[key], total[key] / 3) for key in found if found[key].is_floating_point())
    model[0].weight.data = model[0].weight.data * 2
    average.update()
    model.append(nn.Linear(3, 1))
    with pytest.raises(InvalidInput, match=r"not known: 2.bias, 2.weight"):
        average._source._look(model.state_dict())


@pytest.mark.parametrize("kind", ["best", "running", "exponential"])
def test_a_device_without_room_leaves_the_average_in_host_memory_with_the_same_bits(kind, monkeypatch, caplog):
    """`torch.empty` is replaced here for the one call that allocates an average's memory on the device."""

    def train():
        torch.manual_seed(0)
        model = nn.Linear(9, 7)
        made = {"best": lambda: BestAverage(model, k=2), "running": lambda: RunningAverage(model)}
        average = made.get(kind, lambda: ExponentialAverage(model))()
        for number in range(5):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            average.update(*([float(number)] if kind == "best" else []))
            average.averaged_state_dict()
        return copied(average.averaged_state_dict())

    expected, real, refused = train(), torch.empty, []

    def empty(*args, **options):
        if sys._getframe(1).f_code.co_name == "_memory" and options["device"] != "cpu":
            refused.append(options)
            raise torch.OutOfMemoryError("no room")
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(fusing.torch, "empty", empty)
        found = train()
    assert refused
    assert "no room for" in caplog.text
    assert_same_bits(found, expected)


@pytest.mark.parametrize("make", [RunningAverage, ExponentialAverage, lambda model: BestAverage(model, k=2)])
def test_how_much_is_worked_on_at_a_time_changes_no_bit(make, monkeypatch):
    found = []
    # all at once; 64 float64 at a time, across the tensors' edges; and tensors of twenty elements by themselves, as on a GPU
    for block_bytes, alone in ((2 << 20, {}), (512, {}), (512, {"cpu": 20})):
        monkeypatch.setattr(fusing, "_BLOCK_BYTES", {"cpu": block_bytes})
        monkeypatch.setattr(fusing, "_ALONE", alone)
        model = nn.ParameterDict(
            {str(size): nn.Parameter(torch.zeros(size, dtype=torch.float16)) for size in (1, 23, 7, 0, 40, 300)}
        )
        average = make(model)
        for number in range(4):
            with torch.no_grad():
                for parameter in model.values():
                    parameter.copy_(torch.linspace(-number, number + 0.3, len(parameter)))
            average.update(*[float(number)] * isinstance(average, BestAverage))
            average.averaged_state_dict()
        found.append(average.averaged_state_dict())
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("make", [RunningAverage, ExponentialAverage, lambda model: BestAverage(model, k=2)])
def test_many_tensors_are_copied_in_lists_of_one_kind_to_aligned_places(make, monkeypatch):
    """Up to torch 2.10 a GPU writes a list of several dtypes as if all had the first one's: over the memory behind."""
    given, copy = [], torch._foreach_copy_

    def watched(targets, sources):
        given.extend({(tensor.device, tensor.dtype) for tensor in tensors} for tensors in (targets, sources))
        return copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64
    model = nn.ParameterDict(
        {str(place): nn.Parameter(torch.zeros(5 + place, dtype=dtype)) for place, dtype in enumerate(2 * dtypes)}
    )
    average = make(model)
    for number in range(4):
        average.update(*[float(number)] * isinstance(average, BestAverage))
        average.averaged_state_dict()
    with average.applied():
        pass
    assert given
    assert all(len(kinds) <= 1 for kinds in given)
    assert all(part.storage_offset() % 64 == 0 for part in fusing.empty_parts(list(model.values()), 5 * dtypes[:2]))
