"""Averages are what their formula says, to the last bit that the dtype has, on every rank."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks, values
from torch import nn

import runmgr
from runmgr.errors import InvalidInput, RunError
from runmgr.worker.accumulating import ExponentialAverage, RunningAverage
from runmgr.worker.best import BestAverage
from runmgr.worker.members import same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
KINDS = pytest.mark.parametrize(
    "make",
    [lambda model: BestAverage(model, k=3), RunningAverage, lambda model: ExponentialAverage(model, 0.9)],
    ids=["best", "running", "exponential"],
)


class Net(nn.Module):
    """Parameters, BatchNorm's floating and integer buffers, a boolean mask, and an empty parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("mask", torch.zeros(8, dtype=torch.bool))
        self.empty = nn.Parameter(torch.zeros(0))
        self.to(dtype)

    def forward(self, x):
        return self.norm(self.linear(x))


@torch.no_grad()
def shake(model, seed, scale=1.0):
    """Give every tensor of the model a new value and return the state dict, copied."""
    random = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64) * scale)
        else:
            tensor.copy_(torch.randint(0, 2, tensor.shape, generator=random) * (seed + 1))
    return copied(model.state_dict())


def copied(state):
    return {key: tensor.clone() for key, tensor in state.items()}


def mean(states):
    """The reference: the mean in float64, integer and boolean tensors from the newest."""
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for key, tensor in states[-1].items()
    }


def assert_within_one_ulp(result, reference):
    assert result.keys() == reference.keys()
    for key, exact in reference.items():
        got = result[key]
        if not got.is_floating_point():
            assert torch.equal(got, exact), key
            continue
        above = torch.nextafter(exact.to(got.dtype), torch.full_like(got, math.inf)).double()
        below = torch.nextafter(exact.to(got.dtype), torch.full_like(got, -math.inf)).double()
        assert bool(((below <= got.double()) & (got.double() <= above)).all()), key


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key].reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)), key


def numbers(average):
    return [member.metric for member in sorted(average.members, key=lambda member: member.number)]


@DTYPES
def test_best_average_is_the_mean_of_the_k_best_to_one_ulp(dtype):
    model = Net(dtype)
    average = BestAverage(model, k=4)
    metrics = [0.5, 0.9, 0.1, 0.7, 0.8, 0.2, 0.6, 0.95, 0.3]
    states = []
    for seed, metric in enumerate(metrics):
        states.append(shake(model, seed, scale=10.0 ** (seed % 3)))
        average.update(metric=metric)
    best = [states[index] for index in (1, 3, 4, 7)]
    assert_within_one_ulp(average.averaged_state_dict(), mean(best))
    assert numbers(average) == [0.9, 0.7, 0.8, 0.95]


@DTYPES
def test_running_average_is_the_mean_of_all_states_to_one_ulp(dtype):
    model = Net(dtype)
    average = RunningAverage(model)
    states = []
    for seed in range(50):
        states.append(shake(model, seed, scale=10.0 ** (seed % 4)))
        average.update()
    assert_within_one_ulp(average.averaged_state_dict(), mean(states))


@DTYPES
def test_exponential_average_is_the_lerp_recurrence_bit_for_bit(dtype):
    model = Net(dtype)
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    average = ExponentialAverage(model, decay=0.97)
    reference = {key: value.to(wide) for key, value in copied(model.state_dict()).items() if value.is_floating_point()}
    for seed in range(20):
        newest = shake(model, seed)
        average.update()
        for key, tensor in reference.items():
            tensor.lerp_(newest[key].to(wide), 1 - 0.97)
    expected = {key: reference[key].to(dtype) if key in reference else newest[key] for key in newest}
    assert_same_bits(average.averaged_state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_floating_dtypes_keep_their_precision(dtype):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, dtype=dtype))})
    best, running, exponential = BestAverage(model, k=2), RunningAverage(model), ExponentialAverage(model, 0.5)
    for value in (1.0, 2.0):
        with torch.no_grad():
            model["w"].fill_(value)
        best.update(value)
        running.update()
        exponential.update()
    for average, expected in ((best, 1.5), (running, 1.5), (exponential, 1.25)):
        found = average.averaged_state_dict()["w"]
        assert found.dtype == dtype
        assert found.tolist() == [expected] * 4


@KINDS
def test_integer_and_boolean_buffers_come_from_the_newest_member(make):
    model = Net()
    average = make(model)
    for seed in range(3):
        newest = shake(model, seed)
        average.update(*([float(seed)] if isinstance(average, BestAverage) else []))
    shake(model, 7)  # the model moves on without an update
    found = average.averaged_state_dict()
    for key in ("norm.num_batches_tracked", "mask"):
        assert torch.equal(found[key], newest[key])
        assert found[key].dtype == newest[key].dtype


@given(
    metrics=st.lists(
        st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]), st.floats()), min_size=1, max_size=12
    ),
    k=st.integers(1, 4),
    mode=st.sampled_from(["max", "min"]),
)
@settings(max_examples=60, deadline=None, database=None)
def test_members_are_the_first_k_of_a_stable_sort_of_the_finite_metrics(metrics, k, mode):
    model = nn.Linear(1, 1, bias=False)
    average = BestAverage(model, k=k, mode=mode)
    for number, metric in enumerate(metrics):
        with torch.no_grad():
            model.weight.fill_(number)
        average.update(metric)
    finite = [number for number, metric in enumerate(metrics) if math.isfinite(metric)]
    ordered = sorted(finite, key=lambda number: (metrics[number], 0), reverse=mode == "max")  # stable: ties keep older
    expected = sorted(ordered[:k])
    found = sorted(member.weights[0].item() for member in average.members)
    assert found == expected


def test_weights_that_are_not_finite_never_enter_whatever_their_metric():
    model = Net()
    average = BestAverage(model, k=2)
    first = shake(model, 1)
    assert average.update(0.1) is True
    for poison, where in ((math.nan, "linear.weight"), (math.inf, "norm.running_var")):
        shake(model, 2)
        model.state_dict()[where].view(-1)[0] = poison
        assert average.update(0.9) is False
    assert average.update(math.nan) is False
    assert_same_bits(average.averaged_state_dict(), first)


def test_mode_min_and_ties_keep_the_older():
    model = Net()
    average = BestAverage(model, k=1, mode="min")
    shake(model, 0)
    assert average.update(2.0)
    first = shake(model, 1)
    assert average.update(1.0)
    shake(model, 2)
    assert not average.update(1.0)
    assert_same_bits(average.averaged_state_dict(), first)


@KINDS
def test_before_the_first_update_there_is_either_an_average_or_a_clear_error(make):
    model = Net()
    average = make(model)
    if isinstance(average, ExponentialAverage):
        assert_same_bits(average.averaged_state_dict(), copied(model.state_dict()))
    else:
        with pytest.raises(InvalidInput, match="update"):
            average.averaged_state_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: BestAverage(model, k=0),
        lambda model: BestAverage(model, k=True),
        lambda model: BestAverage(model, mode="maximum"),
        lambda model: ExponentialAverage(model, decay=1.0),
        lambda model: ExponentialAverage(model, decay=-0.1),
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InvalidInput):
        wrong(Net())


@KINDS
def test_the_average_never_shares_memory_with_the_model_or_itself(make):
    model = Net()
    average = make(model)
    shake(model, 1)
    average.update(*([1.0] if isinstance(average, BestAverage) else []))
    first = average.averaged_state_dict()
    kept = copied(first)
    shake(model, 2)
    for tensor in average.averaged_state_dict().values():
        tensor.zero_()
    assert_same_bits(first, kept)
    assert_same_bits(average.averaged_state_dict(), kept)


@KINDS
@pytest.mark.parametrize("fails", [False, True])
def test_applied_puts_the_average_in_and_the_models_own_bits_back(make, fails):
    model = Net()
    average = make(model)
    for seed in range(3):
        shake(model, seed)
        average.update(*([float(seed)] if isinstance(average, BestAverage) else []))
    own = shake(model, 9)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    expected = average.averaged_state_dict()
    parameters = list(map(id, model.parameters()))

    def validate():
        with average.applied():
            assert_same_bits(copied(model.state_dict()), expected)
            model.train()(torch.randn(4, 64))  # moves BatchNorm's buffers
            if fails:
                raise KeyError("in validation")

    if fails:
        with pytest.raises(KeyError, match="in validation"):
            validate()
    else:
        validate()
    assert_same_bits(copied(model.state_dict()), own)
    assert list(map(id, model.parameters())) == parameters
    assert bool((model.linear.weight.grad == 1).all())


@KINDS
def test_a_wrapped_model_gives_bare_keys(make):
    model = Net()
    average = make(nn.DataParallel(model))
    shake(model, 1)
    average.update(*([1.0] if isinstance(average, BestAverage) else []))
    Net().load_state_dict(average.averaged_state_dict())


def objects(run):
    return sorted(path.name for path in (run.run_dir / ".runmgr" / "checkpoints").iterdir())


def test_a_member_shares_the_bytes_of_the_checkpoint_saved_after_its_update():
    model = Net()
    average = BestAverage(model, k=2)
    states = []
    with runmgr.start_run("x", keep=runmgr.Keep(last=1)) as run:
        for epoch, metric in enumerate([0.5, 0.9, 0.1, 0.2, 0.7], 1):
            states.append(shake(model, epoch))
            average.update(metric)
            run.save({"net": model, "average": average}, epoch=epoch)
            saved = torch.load(run.path("latest"), weights_only=True)["average"]
            assert all(member.weights is None for member in average.members), "the copy in memory was dropped"
            assert all(member["weights"] is None for member in saved["members"]), "and not written a second time"
        assert objects(run) == ["0001-000002.pth", "0001-000005.pth"]  # evicted members went, members stayed
        assert_within_one_ulp(average.averaged_state_dict(), mean([states[1], states[4]]))
        path = run.save_average(average)
    content = torch.load(path, weights_only=True)
    assert_within_one_ulp(content["net"], mean([states[1], states[4]]))
    assert content["members"] == [
        {"metric": 0.9, "checkpoint": "0001-000002.pth"},
        {"metric": 0.7, "checkpoint": "0001-000005.pth"},
    ]
    Net().load_state_dict(content["net"])


def test_a_damaged_member_leaves_the_average_loudly():
    model = Net()
    average = BestAverage(model, k=3)
    states = []
    with runmgr.start_run("x") as run:
        for epoch in (1, 2, 3):
            states.append(shake(model, epoch))
            average.update(epoch)
            run.save({"net": model, "average": average}, epoch=epoch)
        damaged = average.members[0].path
        damaged.chmod(0o644)
        content = bytearray(damaged.read_bytes())
        place = content.find(states[0]["linear.weight"].numpy().tobytes())
        assert place > 0
        content[place] ^= 64
        damaged.write_bytes(content)
        assert_within_one_ulp(average.averaged_state_dict(), mean(states[1:]))
        assert [member.metric for member in average.members] == [2, 3]
        log = next(run.run_dir.glob("log_*.txt")).read_text()
    assert f"(metric 1) is left out, 2 stay: {damaged} is damaged" in log


def test_members_stay_through_saves_without_the_average_and_a_restart():
    model = Net()
    average = BestAverage(model, k=2)
    states = []
    with runmgr.start_run("x", keep=runmgr.Keep(last=1)) as run:
        for epoch in (1, 2):
            states.append(shake(model, epoch))
            average.update(epoch)
            run.save({"net": model, "average": average}, epoch=epoch)
        run.save({"net": model}, epoch=3)
        assert_within_one_ulp(average.averaged_state_dict(), mean(states))
        run.save({"net": model, "average": average}, epoch=4)
    restored = BestAverage(model, k=2)
    with runmgr.start_run("x", run_id=run.run_id, keep=runmgr.Keep(last=1)) as run:
        run.restore({"net": model, "average": restored})
        run.save({"net": model}, epoch=5)
        assert_within_one_ulp(restored.averaged_state_dict(), mean(states))


def test_the_memory_of_a_member_is_used_again_by_the_next():
    model = Net()
    average = BestAverage(model, k=1)
    with runmgr.start_run("x") as run:
        average.update(1)
        first = [tensor.data_ptr() for tensor in average.members[0].weights]
        run.save({"net": model, "average": average}, epoch=1)
        state = shake(model, 2)
        average.update(2)
        assert [tensor.data_ptr() for tensor in average.members[0].weights] == first
        assert_same_bits(average.averaged_state_dict(), state)
        with torch.no_grad():
            model.linear.weight[0] = float("nan")
        assert not average.update(3)
        assert_same_bits(average.averaged_state_dict(), state)


def test_weights_that_changed_between_update_and_save_are_stored_beside_and_stay_right():
    model = Net()
    average = BestAverage(model, k=3)
    with runmgr.start_run("x") as run:
        member = shake(model, 1)
        average.update(0.5)
        shake(model, 2)  # an optimizer step between update() and save()
        run.save({"net": model, "average": average}, epoch=1)
        (kept,) = torch.load(run.path("latest"), weights_only=True)["average"]["members"]
        assert kept["object"] is None
        assert_same_bits(kept["weights"], member)
        assert average.members[0].weights is None, "it lies in the checkpoint from now on"
        assert_same_bits(average.averaged_state_dict(), member)
        run.save({"net": model, "average": average}, epoch=2)
        (again,) = torch.load(run.path("latest"), weights_only=True)["average"]["members"]
        assert (again["object"], again["weights"]) == ("0001-000001.pth", None), "and is not written twice"
        run_id = run.run_id
    fresh = Net()
    restored = BestAverage(fresh, k=3)
    with runmgr.start_run("x", run_id=run_id) as run:
        run.restore({"net": fresh, "average": restored})
        assert_same_bits(restored.averaged_state_dict(), member)


def test_one_changed_bit_is_a_change():
    model = Net()
    average = BestAverage(model)
    with runmgr.start_run("x") as run:
        with torch.no_grad():
            model.linear.bias.zero_()
        average.update(0.5)
        with torch.no_grad():
            model.linear.bias[3] = -0.0  # equal as a number, not as bits
        run.save({"net": model, "average": average}, epoch=1)
    assert average.members[0].key == "average"


def test_two_updates_before_a_save_keep_both_members():
    model = Net()
    average = BestAverage(model)
    states = []
    with runmgr.start_run("x") as run:
        for seed in (1, 2):
            states.append(shake(model, seed))
            average.update(seed)
        run.save({"net": model, "average": average}, epoch=1)
        assert [member.object_name for member in average.members] == ["0001-000001.pth"] * 2
        assert [member.key for member in average.members] == ["average", "net"]
        run.save({"net": model, "average": average}, epoch=2)
        assert_within_one_ulp(average.averaged_state_dict(), mean(states))


@KINDS
@pytest.mark.parametrize("how", ["run_id", "fork_from"])
def test_the_average_goes_on_after_a_restart_and_in_a_fork(make, how):
    model, straight_model = Net(), Net()
    average, straight = make(model), make(straight_model)
    if isinstance(average, ExponentialAverage):
        straight.load_state_dict(average.state_dict())

    def train(model, average, seeds, run=None):
        for seed in seeds:
            shake(model, seed)
            average.update(*([float(seed % 4)] if isinstance(average, BestAverage) else []))
            if run is not None:
                run.save({"net": model, "average": average}, epoch=seed)

    train(straight_model, straight, range(1, 9))
    with runmgr.start_run("x") as run:
        train(model, average, range(1, 5), run)
        parent = run.run_id
    model = Net()
    average = make(model)
    with runmgr.start_run("x", **{how: parent}) as run:
        assert run.restore({"net": model, "average": average}).epoch == 4
        train(model, average, range(5, 9), run)
        if how == "fork_from":
            import shutil

            shutil.rmtree(run.run_dir.parent / parent)  # a fork stands on its own
        assert_same_bits(average.averaged_state_dict(), straight.averaged_state_dict())


def test_a_smaller_k_after_a_restart_keeps_the_best():
    model = Net()
    average = BestAverage(model, k=5)
    with runmgr.start_run("x") as run:
        for epoch in range(1, 6):
            shake(model, epoch)
            average.update(epoch)
            run.save({"net": model, "average": average}, epoch=epoch)
        run_id = run.run_id
    with runmgr.start_run("x", run_id=run_id) as run:
        smaller = BestAverage(model, k=2)
        run.restore({"net": model, "average": smaller})
        assert numbers(smaller) == [4, 5]
        shake(model, 6)
        smaller.update(4.5)
        assert numbers(smaller) == [5, 4.5]


def test_a_member_whose_file_is_damaged_is_a_clear_error_not_a_wrong_average():
    model = Net()
    average = BestAverage(model)
    with runmgr.start_run("x") as run:
        shake(model, 1)
        average.update(1)
        run.save({"net": model, "average": average}, epoch=1)
        path = average.members[0].path
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(RunError, match=path.name):
            average.averaged_state_dict()


def test_every_rank_gets_rank_0s_bits_also_where_the_ranks_buffers_differ():
    def train(rank):
        torch.manual_seed(0)
        model = Net()
        averages = BestAverage(model, k=2), RunningAverage(model), ExponentialAverage(model, 0.9)
        states = []
        for step in range(3):
            states.append(shake(model, step))
            with torch.no_grad():
                model.norm.running_mean += rank  # as BatchNorm's do in DDP
                model.norm.num_batches_tracked += rank
            averages[0].update(step if rank == 0 else 100 - step)
            averages[1].update()
            averages[2].update()
        before = copied(model.state_dict())
        results = [copied(average.averaged_state_dict()) for average in averages]
        for average, result in zip(averages, results, strict=True):
            with average.applied():
                assert_same_bits(copied(model.state_dict()), result)
        assert_same_bits(copied(model.state_dict()), before)
        return results, states

    (first, states), (second, _) = values(run_ranks(2, train, store="group"))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)
    assert_within_one_ulp(first[0], mean(states[1:]))
    assert_within_one_ulp(first[1], mean(states))


def test_several_ranks_without_a_group_get_a_clear_error_from_averaging():
    def train(_rank):
        average = RunningAverage(Net())
        average.update()
        average.averaged_state_dict()

    for outcome in run_ranks(2, train):
        assert type(outcome.error) is RunError
        assert "init_process_group" in str(outcome.error)


def test_a_mode_that_clashes_with_the_runs_is_refused_and_nothing_is_saved():
    model = Net()
    average = BestAverage(model, mode="min")
    with runmgr.start_run("x", monitor="accuracy", mode="max") as run:
        average.update(1)
        with pytest.raises(InvalidInput, match="mode='min'"):
            run.save({"net": model, "average": average}, epoch=1, metrics={"accuracy": 1})
        assert objects(run) == []


def test_averages_survive_a_deepcopy_and_keep_their_files_read_only():
    model = Net()
    average = BestAverage(model)
    with runmgr.start_run("x") as run:
        shake(model, 1)
        average.update(1)
        run.save({"net": model, "average": average}, epoch=1)
        assert not os.stat(run.path("latest")).st_mode & 0o222
        assert_same_bits(copy.deepcopy(average).averaged_state_dict(), average.averaged_state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_a_member_shares_bytes_only_with_the_very_same_bits(dtype):
    one = torch.randint(0, 2, (1001, 3)).to(dtype)
    two = one.clone()
    assert same_bits(one, two)
    assert same_bits(one.t(), two.t().contiguous())
    two.view(torch.uint8)[-1, -1] ^= 1
    assert not same_bits(one, two)
    assert not same_bits(one, one[:-1])
    assert same_bits(one[:0], two[:0])


def test_for_sharing_bytes_nan_is_itself_and_the_zeros_differ():
    nan = torch.tensor([math.nan])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
