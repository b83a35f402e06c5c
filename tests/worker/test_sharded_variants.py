"""What people put around FSDP2 does not show in the files: a plain training and one under DDP load them."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks, values
from torch import nn

import runmgr

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo's own
]
VARIANTS = ("hsdp", "mixed precision", "activation checkpointing", "compiled", "compiled blocks", "compiled in place")


def build():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)), nn.Linear(16, 1))


def shard(model, variant):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    names = ("replicate", "shard") if variant == "hsdp" else ("shard",)
    more = {"mesh": init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)}
    if variant == "mixed precision":
        more["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for place in range(2):
        if variant == "activation checkpointing":
            model[place] = checkpoint_wrapper(model[place])
        if variant == "compiled blocks":
            model[place] = torch.compile(model[place], backend="eager")
        if variant == "compiled in place":
            model[place].compile(backend="eager")
        fully_shard(model[place], **more)
    fully_shard(model, **more)
    return torch.compile(model, backend="eager") if variant == "compiled" else model


def parts(model):
    faded = runmgr.ExponentialAverage(model, decay=0.9)
    best = runmgr.BestAverage(model, k=2, mode="min")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {"net": model, "optimizer": optimizer, "faded": faded, "best": best}


def train(rank, root, variant):
    model = shard(build(), variant)
    state = parts(model)
    with runmgr.start_run("sharded", ckpt_root_dir=root) as run:
        run.restore(state)
        for epoch in range(3):
            state["optimizer"].zero_grad()
            model(torch.randn(8, 16) + rank).float().square().mean().backward()
            state["optimizer"].step()
            state["faded"].update()
            state["best"].update(1 / (epoch + 1))
            run.save(state, epoch=epoch + 1, block=epoch == 0)
        path = run.save_average(state["best"])
        assert any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        own = [tensor.full_tensor().clone() for tensor in model.state_dict().values()]
        faded = [tensor.full_tensor() for tensor in state["faded"].averaged_state_dict().values()]
        return own, faded, torch.load(path, weights_only=True)["net"]


def load(_, root):
    model = build()
    if torch.distributed.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    state = parts(model)
    with runmgr.start_run("sharded", ckpt_root_dir=root, resume="latest") as run:
        assert run.restore(state).epoch == 3
        model(torch.randn(8, 16)).square().mean().backward()
        before = [tensor.clone() for tensor in model.state_dict().values()]
        state["optimizer"].step()
        return before, state["faded"].averaged_state_dict(), state["best"].averaged_state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_put_around_a_sharded_model_does_not_show_in_its_files(root, variant):
    (own, faded, best), *_ = values(run_ranks(4 if variant == "hsdp" else 2, train, root, variant, store="group"))
    keys = list(build().state_dict())
    for world in (1, 2):
        for loaded, loaded_faded, loaded_best in values(run_ranks(world, load, root, store="group")):
            assert all(map(torch.equal, loaded, own))
            assert list(loaded_faded) == list(loaded_best) == list(best) == keys
            assert all(map(torch.equal, loaded_faded.values(), faded))
            assert all(map(torch.equal, loaded_best.values(), best.values()))
