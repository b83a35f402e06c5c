"""Versions of modules, shared memory and marks: what a restore must get back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import runmgr


class _Turned(nn.Module):
    """Its files were turned round in version 1, as a module of a library may have changed."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0).view(2, 2))

    def _load_from_state_dict(self, state, prefix, metadata, *arguments):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].t()
        super()._load_from_state_dict(state, prefix, metadata, *arguments)

    def forward(self, x):
        return x @ self.weight


_WANTED = [[0.0, 1.0], [2.0, 3.0]]


def _compiled_inside():
    return nn.Sequential(torch.compile(_Turned()), nn.BatchNorm1d(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile itself
@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(_Turned(), nn.BatchNorm1d(2)), _compiled_inside])
def test_a_module_with_a_version_does_not_migrate_its_own_checkpoint(make, block):
    model = make()
    with runmgr.start_run("versions") as run:
        run.save({"net": model}, epoch=1, block=block)
        run.wait()
        run.restore({"net": model})
        saved = run.load("latest")["net"]
    assert model[0].weight.tolist() == _WANTED
    assert saved._metadata["0"] == {"version": 2}
    assert saved._metadata["1"] == {"version": 2}
    assert set(saved._metadata) == {"", "0", "1"}
    plain = nn.Sequential(_Turned(), nn.BatchNorm1d(2))
    plain.load_state_dict(saved)
    assert plain[0].weight.tolist() == _WANTED


@pytest.mark.parametrize("kind", [runmgr.BestAverage, runmgr.RunningAverage, runmgr.ExponentialAverage])
def test_averages_of_a_module_with_a_version_are_not_migrated(kind):
    model = nn.Sequential(_Turned())
    average = kind(model)
    average.update(1.0) if kind is runmgr.BestAverage else average.update()
    with average.applied():
        assert model[0].weight.tolist() == _WANTED
    assert model[0].weight.tolist() == _WANTED
    with runmgr.start_run("versions") as run:
        run.save_average(average)
        model.load_state_dict(run.load("average")["net"])
    assert model[0].weight.tolist() == _WANTED


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dynamically_quantised_model_can_be_restored():
    make = lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), dtype=torch.qint8)  # noqa: E731
    model, other = make(), make()
    with runmgr.start_run("quantised") as run:
        run.save({"net": model}, epoch=1)
        run.restore({"net": other})
    given = torch.randn(2, 4)
    assert torch.equal(model(given), other(given))


def test_plain_values_that_shared_memory_share_it_again_and_nothing_else():
    base = torch.arange(6.0)
    state = {
        "a": {"whole": base, "part": base[2:4]},
        "b": base,
        "c": torch.zeros(1).expand(3),
        "d": torch.eye(2).to_sparse(),
    }
    with runmgr.start_run("shared") as run:
        run.save(state, epoch=1)
        one, other = run.restore(state).values, run.restore(state).values
    one["b"][3] = 30
    assert one["a"]["whole"].tolist() == [0, 1, 2, 30, 4, 5]
    assert one["a"]["part"].tolist() == [2, 30]
    assert other["b"].tolist() == base.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(one["d"].to_dense(), torch.eye(2))
    assert one["c"].tolist() == [0, 0, 0]


def test_conjugated_tensors_come_back_with_their_values():
    value = torch.tensor([1 + 2j]).conj()
    with runmgr.start_run("conjugated") as run:
        run.save({"x": value, "tied": value}, epoch=1)
        assert run.restore({"x": 0}).values["x"].tolist() == [1 - 2j]


def test_a_parameter_that_is_a_plain_value_comes_back_without_a_history():
    with runmgr.start_run("parameter") as run:
        run.save({"x": nn.Parameter(torch.ones(2))}, epoch=1)
        found = run.restore({"x": None}).values["x"]
    assert found.is_leaf
    assert not found.requires_grad


class _Loader:
    loaded = None

    def state_dict(self):
        return {"position": 1}

    def load_state_dict(self, state):
        self.loaded = state


def test_a_per_rank_mark_on_one_side_only_is_an_error_that_names_the_key_and_loads_nothing():
    first, loader = _Loader(), _Loader()
    with runmgr.start_run("marks") as run:
        run.save({"first": first, "data": loader}, epoch=1)
        with pytest.raises(
            runmgr.InvalidInput, match=r"state\['data'\] is marked per_rank, but the checkpoint holds it once"
        ):
            run.restore({"first": first, "data": runmgr.per_rank(loader)})
        run.save({"first": first, "data": runmgr.per_rank(loader)}, epoch=2)
        with pytest.raises(runmgr.InvalidInput, match=r"holds 'data' for each of 1 ranks.*restore it as per_rank"):
            run.restore({"first": first, "data": loader})
        with pytest.raises(runmgr.InvalidInput, match="the one key 'per_rank', which runmgr uses"):
            run.save({"first": {"per_rank": [1]}}, epoch=3)
    assert first.loaded is loader.loaded is None


class _WithExtraState(nn.Module):
    def __init__(self):
        super().__init__()
        self.extra = {"scale": torch.ones(3)}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_of_a_module_does_not_stay_in_the_file():
    model = _WithExtraState()
    with runmgr.start_run("extra") as run:
        run.save({"net": model}, epoch=1)
        run.restore({"net": model})
        with open("/proc/self/maps") as maps:
            lines = [line for line in maps if ".pth" in line]
    assert model.extra["scale"].tolist() == [1, 1, 1]
    ranges = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in lines]
    assert not any(start <= model.extra["scale"].data_ptr() < end for start, end in ranges)


def test_a_model_without_sizes_yet_can_be_given_to_restore():
    with runmgr.start_run("lazy") as run:
        assert run.restore({"net": nn.Sequential(nn.LazyLinear(3))}).epoch == 0
