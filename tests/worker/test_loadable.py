"""What may stand in a state: whatever is saved can be loaded with weights_only=True, anything else is refused by its place."""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import pathlib

import pytest
import torch
from torch import nn

import runmgr
from runmgr.worker.loadable import loadable


class _Colour(enum.Enum):
    RED = "red"


class _Text(str):
    __slots__ = ()


class _Subclass(torch.Tensor):
    pass


class _Ordered(collections.OrderedDict):
    pass


class _Loader:
    def state_dict(self):
        return {"position": 1}

    def load_state_dict(self, state):
        raise AssertionError


@dataclasses.dataclass
class _Facts:
    step: int
    ema: torch.Tensor
    loss: float


_Pair = collections.namedtuple("_Pair", "first second")  # noqa: PYI024  # as users have them
_GREATEST = (1 << 2039) - 1
KEPT = [
    None, True, 3, -_GREATEST, _GREATEST, 1.5, float("-inf"), 2j, "text", "\ud800", b"\x00\xff", torch.bfloat16,
    torch.device("cpu"), torch.Size([1, 2]), [1, [2]], (1, "a"), {1, 2}, set(), {"a": {1: 2.0}}, collections.Counter(a=1),
    collections.OrderedDict(b=1, a=2),
]  # fmt: skip
MADE_PLAIN = [
    (_Pair(1, [2]), (1, [2])),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    (_Ordered(a=1), collections.OrderedDict(a=1)),
    ({_Colour.RED: _Colour.RED}, {"red": "red"}),
    (pathlib.Path("/a"), "/a"),
    ({_Text("a"): _Text("b")}, {"a": "b"}),
]


def _through_a_file(value):
    buffer = io.BytesIO()
    torch.save(loadable(value, "x"), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _same(one, other):
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("value", KEPT, ids=lambda value: f"{value!r:.30}")
def test_plain_values_come_back_as_they_are(value):
    assert _same(_through_a_file(value), value)


@pytest.mark.parametrize(("value", "plain"), MADE_PLAIN, ids=lambda value: f"{value!r:.30}")
def test_what_has_a_plain_form_is_saved_in_it(value, plain):
    assert _same(_through_a_file(value), plain)


def test_numpy_scalars_become_pythons():
    numpy = pytest.importorskip("numpy")
    values = {
        "f": numpy.float32(1.5),
        "i": numpy.int64(3),
        "z": numpy.complex128(1j),
        "s": numpy.str_("a"),
        "b": numpy.bool_(1),
    }
    values["inf"], values["zero_d"], values[numpy.int64(7)] = numpy.float64("inf"), numpy.array(2), 0
    plain = {"f": 1.5, "i": 3, "z": 1j, "s": "a", "b": True, "inf": float("inf"), "zero_d": 2, 7: 0}
    found = _through_a_file(values)
    assert found == plain
    assert [type(item) for item in found.values()] == [type(item) for item in plain.values()]


def test_a_dataclass_becomes_a_dict_of_its_fields_tensors_and_infinity_included():
    found = _through_a_file([_Facts(3, torch.ones(2), float("inf"))])
    assert found[0]["ema"].tolist() == [1, 1]
    assert (found[0]["step"], found[0]["loss"]) == (3, float("inf"))


REFUSED = {
    "a number that is too long": (1 << 2039, "2040 bits"),
    "a key that is too long": ({1 << 3000: 1}, "3001 bits"),
    "empty bytes": (b"", "empty bytes"),
    "deque": (collections.deque([1]), "collections.deque"),
    "frozenset": (frozenset({1}), "builtins.frozenset"),
    "bytearray": (bytearray(b"a"), "builtins.bytearray"),
    "a class": (_Facts, "builtins.type"),
    "per_rank": (runmgr.per_rank(_Loader()), "marked per_rank, which only works at the top level"),
    "a module": (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "a subclass of Tensor": (torch.ones(2).as_subclass(_Subclass), "_Subclass"),
    "a meta tensor": (torch.ones(2, device="meta"), "meta device"),
    "an mkldnn tensor": (torch.ones(2).to_mkldnn(), "layout torch._mkldnn"),
    "a set of tensors": ({torch.ones(1)}, "set of more than plain values"),
    "keys that become equal": ({"red": 1, _Colour.RED: 2}, "equal once they are plain"),
    "a tuple as a key": ({(1, 2): 3}, "has the key"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("block", [True, False])
def test_what_cannot_be_loaded_is_refused_by_its_place_and_nothing_is_written(name, block):
    value, text = REFUSED[name]
    with runmgr.start_run("refused") as run:
        run.save({"x": 1}, epoch=1)
        before = sorted(run.run_dir.rglob("*.pth"))
        with pytest.raises(runmgr.InvalidInput, match=r"state\['x\.inner\[1\](\[0\])?'\]") as caught:
            run.save({"x": {"inner": [0, value]}}, epoch=2, block=block)
        run.wait()
        assert text in str(caught.value)
        assert sorted(run.run_dir.rglob("*.pth")) == before


@pytest.mark.parametrize("kind", ["datetime64", "timedelta64", "longdouble", "array"])
def test_numpys_dates_long_doubles_and_arrays_are_refused(kind):
    numpy = pytest.importorskip("numpy")
    value = {
        "datetime64": numpy.datetime64(1, "ns"),  # whose item() is a bare number
        "timedelta64": numpy.timedelta64(1, "ns"),
        "longdouble": numpy.longdouble(1),
        "array": numpy.ones(2),
    }[kind]
    with pytest.raises(runmgr.InvalidInput, match=r"state\['x\.a'\] is a numpy\."):
        loadable({"a": value}, "x")


def test_attributes_and_gradients_of_tensors_stay_behind():
    parameter = nn.Parameter(torch.ones(2))
    parameter.owner = _Loader()
    found = _through_a_file(parameter)
    assert type(found) is torch.Tensor
    assert not found.requires_grad
