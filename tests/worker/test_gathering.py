"""States that all ranks bring together: sharded tensors wherever they lie, and an error on any rank at once on all."""

from __future__ import annotations

import time
from collections import UserDict
from types import MappingProxyType

import pytest
import torch
from processes import run_ranks, values
from torch import nn

import runmgr
from runmgr.worker import gathering

_TIMEOUT_S = 8.0


def _sharded_training():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


class _Holder:
    def __init__(self, state):
        self.state = state
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        return self.state

    def load_state_dict(self, state):
        self.state = state


CASES = {
    "a module's state dict": lambda model, _: {"x": model.state_dict()},
    "an optimizer alone": lambda _, optimizer: {"x": optimizer},
    "an object that holds some": lambda model, _: {"x": _Holder({"nested": [model.state_dict()]})},
    "in nested containers": lambda model, _: {"x": (1, {"parameters": list(model.parameters())})},
    "a mapping that is no dict": lambda model, _: MappingProxyType({"x": model}),
    "another mapping": lambda model, _: UserDict({"a": 1, "x": model}),
}


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _save_sharded(rank, root, case):
    state = CASES[case](*_sharded_training())
    with runmgr.start_run("sharded", ckpt_root_dir=root, timeout_s=_TIMEOUT_S) as run:
        run.save(state, epoch=1, block=case != "an optimizer alone")
        run.wait()
        asked = state["x"].asked if isinstance(state["x"], _Holder) else 1
        return [list(tensor.shape) for tensor in _tensors(run.load("latest")["x"])], asked


@pytest.mark.parametrize("case", CASES)
def test_sharded_tensors_are_saved_whole_wherever_they_lie(root, case):
    outcomes = values(run_ranks(2, _save_sharded, root, case, store="group"))
    shapes, asked = outcomes[0]
    assert [3, 4] in shapes
    assert asked == 1, "state_dict() may be costly, or a collective of its own"


def _without_memory_for_the_second(_state, _model):
    kept, calls = gathering.Gathering._kept, []

    def keep(self, full, local):
        calls.append(full)
        if len(calls) == 2:
            raise MemoryError("no memory for the second one")
        return kept(self, full, local)

    gathering.Gathering._kept = keep


def _without_room(_state, _model):
    empty = torch.empty

    def refuse(*arguments, **options):
        if arguments and tuple(arguments[0]) == (3, 4):
            raise RuntimeError("no room for the greatest")
        return empty(*arguments, **options)

    torch.empty = refuse


FAILURES = {  # the ranks on which it happens, what, and what every rank is told
    "unloadable": ((0, 1), lambda state, _: state.update(x=object()), "state['x'] is a builtins.object"),
    "unloadable on rank 1": ((1,), lambda state, _: state.update(x=object()), "state['x'] is a builtins.object"),
    "shards on rank 1 only": (
        (0,),
        lambda state, _: state.update(net=nn.Linear(4, 3)),
        "state['net'] has 0 sharded tensors on rank 0 and 2 on rank 1",
    ),
    "other shards on rank 1": (
        (1,),
        lambda state, model: state.update(optimizer=torch.optim.SGD(model.parameters())),
        "state['optimizer'] has 4 sharded tensors on rank 0 and 0 on rank 1",
    ),
    "out of memory in the middle": ((0,), _without_memory_for_the_second, "MemoryError: no memory for the second one"),
    "no room on rank 1": ((1,), _without_room, "RuntimeError: no room for the greatest"),
}


def _fail(rank, root, how):
    model, optimizer = _sharded_training()
    state = {"net": model, "optimizer": optimizer}
    ranks, happen, _ = FAILURES[how]
    with runmgr.start_run("failing", ckpt_root_dir=root, timeout_s=_TIMEOUT_S) as run:
        if rank in ranks:
            happen(state, model)
        start = time.monotonic()
        try:
            run.save(state, epoch=1)
        except runmgr.RunError as error:
            seconds = time.monotonic() - start
            time.sleep(2 if rank == 0 else 0)  # nobody depends on this rank's coming back at once
            run.save({"y": 1}, epoch=2)
            return type(error).__name__, str(error), seconds, sorted(run.load("latest"))
    return None


@pytest.mark.parametrize("how", FAILURES)
def test_whatever_fails_while_gathering_is_the_same_error_on_all_within_seconds(root, how):
    outcomes = values(run_ranks(2, _fail, root, how, store="group"))
    (kind, text, *_), (other_kind, other_text, *_) = outcomes
    assert (kind, text) == (other_kind, other_text)
    assert FAILURES[how][2] in text
    assert all(seconds < _TIMEOUT_S / 2 for _, _, seconds, _ in outcomes)
    assert all("y" in saved for *_, saved in outcomes), "the ranks can go on together"


def _save_in_the_background(rank, root):
    model, _ = _sharded_training()
    table = torch.ones(10)
    before = model.weight.full_tensor().detach().clone()
    with runmgr.start_run("background", ckpt_root_dir=root) as run:
        run.restore({"net": model, "table": table})
        run.save({"net": model, "table": table}, epoch=1, block=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        table.zero_()
        run.wait()
        saved = run.load("latest")
        staged = sum(block.size_bytes for block in run._saver._staging._blocks) if rank == 0 else 0
    return torch.equal(saved["net"]["weight"], before), saved["table"].tolist(), staged


@pytest.mark.parametrize("world_size", [1, 2])
def test_gathered_tensors_are_not_copied_once_more_but_what_the_model_owns_is(root, world_size):
    outcomes = values(run_ranks(world_size, _save_in_the_background, root, store="group"))
    for equal, table, _ in outcomes:
        assert equal
        assert table == [1] * 10
    assert world_size == 1 or outcomes[0][2] <= 128, "the table alone was copied"


class _Collective:
    def state_dict(self):
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, torch.distributed.get_rank())
        return {"ranks": everyone}

    def load_state_dict(self, state):
        pass


def _save_collectively(rank, root):
    with runmgr.start_run("collective", ckpt_root_dir=root, timeout_s=_TIMEOUT_S) as run:
        run.save({"x": _Collective()}, epoch=1)
        return run.load("latest")["x"]


def test_a_state_dict_may_speak_with_the_other_ranks(root):
    outcomes = run_ranks(2, _save_collectively, root, store="group")
    assert values(outcomes) == [{"ranks": [0, 1]}] * 2
