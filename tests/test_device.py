"""The same on the CPU and, where there is one, on a GPU: averages stay on the device, files hold what any machine loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import runmgr
from runmgr.worker import staging

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])


def _model(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(device)


@DEVICES
def test_checkpoints_are_averaged_on_a_device_to_the_same_bits(device, tmp_path):
    states = [_model("cpu").half().state_dict() | {"w": torch.randn(300_000)} for _ in range(3)]
    paths = [tmp_path / f"{number}.pth" for number in range(3)]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    runmgr.average_checkpoints(paths, tmp_path / "soup.pth", device=device)
    found = torch.load(tmp_path / "soup.pth", weights_only=True)["net"]
    for key, tensor in states[-1].items():
        exact = torch.stack([state[key].double() for state in states]).sum(0) / 3
        assert torch.equal(found[key], exact.to(tensor.dtype)), key


@DEVICES
@pytest.mark.parametrize("kind", [runmgr.BestAverage, runmgr.RunningAverage, runmgr.ExponentialAverage])
def test_an_average_lives_on_the_models_device_and_survives_a_restore(device, kind):
    model = _model(device)
    average = kind(model)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"net": model, "optimizer": optimizer, "average": average}
    with runmgr.start_run("device") as run:
        run.restore(state)
        for epoch in range(3):
            model(torch.randn(4, 6, device=device)).sum().backward()
            optimizer.step()
            average.update(float(epoch)) if kind is runmgr.BestAverage else average.update()
            run.save(state, epoch=epoch + 1)
        before = average.averaged_state_dict()
        draw = torch.randn(3, device=device)
    other = _model(device)
    other_average = kind(other)
    with runmgr.start_run("device", resume="latest") as run:
        run.restore({"net": other, "average": other_average})
        after = other_average.averaged_state_dict()
        assert torch.equal(torch.randn(3, device=device), draw), "random numbers go on where they were"
    assert {tensor.device.type for tensor in after.values()} == {device}
    assert all(torch.equal(before[key], after[key]) for key in before)


@NEEDS_CUDA
@pytest.mark.parametrize(
    "kind",
    [
        runmgr.BestAverage,
        runmgr.RunningAverage,
        lambda model: runmgr.RunningAverage(model, dtype=torch.float32),
        runmgr.ExponentialAverage,
    ],
)
def test_an_average_of_small_and_large_tensors_of_several_dtypes_has_the_bits_of_a_cpu(kind):
    sizes, dtypes = (3, 1000, 1, 5_000_000), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    found = []
    for place in ("cpu", "cuda"):
        random = torch.Generator().manual_seed(0)
        model = nn.ParameterDict(
            {
                f"{size} {dtype}".replace(".", " "): nn.Parameter(torch.zeros(size, dtype=dtype, device=place))
                for size in sizes
                for dtype in dtypes
            }
        )
        average = kind(model)
        for number in range(3):  # dividing by it is not multiplying by its reciprocal
            with torch.no_grad():
                for parameter in model.values():
                    parameter.copy_(torch.randn(parameter.shape, generator=random))
            average.update(*[float(number)] * isinstance(average, runmgr.BestAverage))
        with average.applied():
            found.append([parameter.detach().cpu() for parameter in model.values()])
        found[-1] += [parameter.detach().cpu() for parameter in model.values()]
    assert all(map(torch.equal, *found))


@NEEDS_CUDA
def test_memory_for_a_background_save_is_pinned_while_it_is_held():
    stage = staging.Staging()
    copied = stage.copy({"a": torch.ones(5_000_000, device="cuda")})["a"]
    assert copied.is_pinned()
    assert copied.sum() == 5_000_000
    stage.release()
    assert not copied.is_pinned()


@DEVICES
def test_checkpoints_load_on_a_machine_without_this_device(device):
    model = _model(device)
    with runmgr.start_run("device") as run:
        run.save({"net": model}, epoch=1)
        loaded = run.load("latest")["net"]
        on_device = run.load("latest", map_location=device)["net"]
    assert {tensor.device.type for tensor in loaded.values()} == {"cpu"}
    assert {tensor.device.type for tensor in on_device.values()} == {device}
    _model("cpu").load_state_dict(loaded)


@NEEDS_CUDA
def test_starting_and_saving_create_no_cuda_context(root):
    code = (
        "import torch, runmgr\n"
        "with runmgr.start_run('context') as run:\n"
        "    run.save({'net': torch.nn.Linear(1, 1)}, epoch=1)\n"
        "print(torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
