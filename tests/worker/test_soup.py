"""The average of checkpoints on disk: right to the last bit, from whole files only, in little memory, or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from disk.shelves import damage
from disk.syscalls import in_child
from processes import clean_environment
from torch import nn

import runmgr
from runmgr import cli
from runmgr.disk import atomic, integrity
from runmgr.errors import CheckpointCorrupt, CheckpointNotFound, InvalidInput, RunBusy

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def weights(seed, dtype=torch.float32, scale=1.0):
    """A state dict with everything that one may hold; two of its tensors share their memory."""
    random = torch.Generator().manual_seed(seed)

    def values(*shape):
        return (torch.randn(shape, generator=random, dtype=torch.float64) * scale).to(dtype)

    large, base = values(700, 1000), values(6, 5)
    return {
        "large": large, "tied": large, "turned": large.t(), "scalar": values(), "empty": values(0, 3),
        "conv": values(4, 3, 5, 5).to(memory_format=torch.channels_last), "row": base[2], "columns": base[:, :2],
        "spread": values(3).expand(4, 3), "count": torch.tensor(seed), "mask": torch.arange(5) % 2 == seed % 2,
        "complex": torch.complex(values(4).float(), values(4).float()), "_extra_state": {"version": seed},
        "every other": (torch.arange(10) + seed)[::2],
    }  # fmt: skip


def mean(states):
    def of(key):
        newest = states[-1][key]
        if not isinstance(newest, torch.Tensor) or not (newest.is_floating_point() or newest.is_complex()):
            return newest
        wide = torch.complex128 if newest.is_complex() else torch.float64
        return torch.stack([state[key].to(wide) for state in states]).mean(0)

    return {key: of(key) for key in states[-1]}


def assert_within_one_ulp(found, exact):
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        got = found[key]
        if not isinstance(value, torch.Tensor):
            assert got == value, key
        elif not got.is_floating_point():
            torch.testing.assert_close(got.to(value.dtype), value, rtol=1e-6, atol=0)
            assert got.shape == value.shape, key
        else:
            nearest = value.to(got.dtype)
            above = torch.nextafter(nearest, torch.full_like(got, math.inf)).double()
            below = torch.nextafter(nearest, torch.full_like(got, -math.inf)).double()
            assert bool(((below <= got.double()) & (got.double() <= above)).all()), key


def saved(folder, states, **more):
    paths = []
    for number, state in enumerate(states):
        torch.save({"net": state, "epoch": number + 1, **more}, folder / f"{number}.pth")
        paths.append(folder / f"{number}.pth")
    return paths


def averaged(paths, output, **options):
    return torch.load(runmgr.average_checkpoints(paths, output, **options), weights_only=True)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@FLOATS
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_mean_is_right_to_one_ulp_and_keeps_dtypes_layouts_and_sharing(tmp_path, dtype, count):
    states = [weights(seed, dtype, scale=10.0 ** (seed % 3)) for seed in range(count)]
    content = averaged(saved(tmp_path, states), tmp_path / "soup.pth")
    found = content["net"]
    assert_within_one_ulp(found, mean(states))
    assert {key: getattr(value, "dtype", None) for key, value in found.items()} == {
        key: getattr(value, "dtype", None) for key, value in states[0].items()
    }
    assert found["conv"].is_contiguous(memory_format=torch.channels_last)
    assert found["large"].data_ptr() == found["tied"].data_ptr() == found["turned"].data_ptr()
    assert [(one["epoch"], one["checkpoint"]) for one in content["members"]] == [
        (number + 1, f"{number}.pth") for number in range(count)
    ]
    assert [one["digest"] for one in content["members"]] == [
        integrity.digest(tmp_path / f"{number}.pth") for number in range(count)
    ]


def test_members_whose_layouts_or_sharing_differ_are_averaged_by_their_values(tmp_path):
    one, other = weights(1), weights(2)
    for key in ("tied", "conv", "large"):
        other[key] = other[key].clone(memory_format=torch.contiguous_format) + (key == "tied")
    found = averaged(saved(tmp_path, [one, other]), tmp_path / "soup.pth")["net"]
    assert_within_one_ulp(found, mean([one, other]))
    assert found["large"].data_ptr() != found["tied"].data_ptr()


def test_the_file_is_whole_read_only_and_can_be_mapped(tmp_path):
    path = runmgr.average_checkpoints(saved(tmp_path, [weights(0), weights(1)]), tmp_path / "soup.pth")
    integrity.check_content(path)
    assert any(entry.crc for entry in _records(path))
    assert path.stat().st_mode & 0o222 == 0
    mapped, loaded = (torch.load(path, weights_only=True, mmap=mmap)["net"] for mmap in (True, False))
    assert torch.equal(mapped["large"], loaded["large"])
    assert left(tmp_path) == ["0.pth", "1.pth", "soup.pth"]


def _records(path):
    with path.open("rb", buffering=0) as file:
        return list(integrity.records_in(file))


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.head, self.norm = nn.Linear(200, 300), nn.BatchNorm1d(300)
        self.tail = nn.Linear(200, 300)
        self.tail.weight = self.head.weight
        self.to(dtype)


@torch.no_grad()
def shake(model, seed):
    random = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64) * 10)


@pytest.fixture
def trained():
    """Train a run whose best three of six were averaged; the fifth epoch is the best."""

    def train(dtype=torch.float32, *, saves_average=False, metrics=(0.1, 0.5, 0.2, 0.6, 0.9, 0.3), offset=0, **options):
        model = Net(dtype)
        average = runmgr.BestAverage(model, k=3)
        with runmgr.start_run("digits", monitor="acc", keep=runmgr.Keep(last=None), **options) as run:
            for epoch, metric in enumerate(metrics, 1):
                shake(model, epoch + offset)
                average.update(metric)
                run.save({"net": model, "average": average}, epoch=epoch, step=10 * epoch, metrics={"acc": metric})
            if saves_average:
                run.save_average(average)
            return run, average.averaged_state_dict()

    return train


@FLOATS
def test_it_is_bit_for_bit_what_the_training_itself_averages(trained, tmp_path, dtype):
    run, expected = trained(dtype, saves_average=True)
    theirs = torch.load(run.path("average"), weights_only=True)["net"]
    ours = averaged(run.run_id, tmp_path / "soup.pth", best=3)["net"]
    assert list(ours) == list(theirs) == list(expected)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    assert ours._metadata == theirs._metadata
    Net(dtype).load_state_dict(ours)


def test_the_best_and_epochs_of_one_run_go_into_its_average_model(trained, capsys):
    run, expected = trained()
    path = runmgr.average_checkpoints(run.run_dir, best=3)
    assert path == run.path("average")
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["net"]["head.weight"], expected["head.weight"])
    assert content["run_id"] == run.run_id
    assert [(one["epoch"], one["step"], one["metric"]) for one in content["members"]] == [
        (2, 20, 0.5), (4, 40, 0.6), (5, 50, 0.9),
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match=r"average_model\.pth is there already; --force"):
        runmgr.average_checkpoints("digits", epochs=[1, 6])
    runmgr.average_checkpoints("digits", epochs=[6, 1], overwrite=True)
    assert [one["epoch"] for one in torch.load(path, weights_only=True)["members"]] == [1, 6]
    with pytest.raises(CheckpointNotFound, match=r"has no checkpoint of epoch 7, 9; it has 1, 2, 3, 4, 5, 6"):
        runmgr.average_checkpoints("digits", epochs=[1, 7, 9], overwrite=True)
    assert cli.main(["verify", "digits", "--deep"]) == 0
    capsys.readouterr()


def test_a_training_that_goes_on_afterwards_saves_its_own_average_and_all_is_well(trained, capsys):
    run, _ = trained()
    runmgr.average_checkpoints(run.run_dir, best=2)
    model = Net()
    average = runmgr.BestAverage(model, k=3)
    with runmgr.start_run("digits", run_id=run.run_id, monitor="acc") as again:
        again.restore({"net": model, "average": average})
        again.save_average(average)
    assert torch.load(run.path("average"), weights_only=True)["average"] == "BestAverage"
    assert cli.main(["verify", "digits", "--deep"]) == 0
    capsys.readouterr()


def test_the_best_of_several_runs_make_a_soup(trained, tmp_path):
    runs = [
        trained(metrics=metrics, offset=10 * number)[0] for number, metrics in enumerate([(0.5, 0.9), (0.7, 0.9, 0.1)])
    ]
    both = [run.run_id for run in runs]
    content = averaged(both, tmp_path / "soup.pth", best=3)
    found = [(one["run_id"], one["metric"]) for one in content["members"]]
    assert found == [(both[0], 0.9), (both[1], 0.7), (both[1], 0.9)]
    assert content["run_id"] is None
    with pytest.raises(InvalidInput, match="an average of 2 runs needs a place of its own"):
        runmgr.average_checkpoints(both, best=3)
    epochs = averaged(both[::-1], tmp_path / "epochs.pth", epochs=[1, 2])["members"]
    assert [(one["run_id"], one["epoch"]) for one in epochs] == [(both[0], 1), (both[0], 2), (both[1], 1), (both[1], 2)]
    assert len(averaged(both, tmp_path / "all.pth", best=100)["members"]) == 5


def test_runs_without_one_metric_have_no_best(trained, tmp_path):
    trained()
    with runmgr.start_run("other", monitor="loss", mode="min") as other:
        other.save({"net": Net()}, epoch=1, metrics={"loss": math.nan})
    with runmgr.start_run("silent") as silent:
        silent.save({"net": Net()}, epoch=1)
    for runs, message in (
        (["digits", "other"], r"do not monitor one metric.*'acc' \(max\).*'loss' \(min\)"),
        (["silent"], "monitored no metric"),
        (["other"], "no checkpoint of .* has the metric 'loss'"),
    ):
        with pytest.raises((InvalidInput, CheckpointNotFound), match=message):
            runmgr.average_checkpoints(runs, tmp_path / "soup.pth", best=2)
    assert not (tmp_path / "soup.pth").exists()


def test_what_a_run_keeps_books_of_is_never_replaced(trained, tmp_path):
    run, _ = trained(saves_average=True)
    recorded = run.path("average").read_bytes()
    for name in ("average", "best", "latest", "ckpt_epoch_2.pth", "ckpt_step_77.pth", "run.json", "config.json"):
        with pytest.raises(InvalidInput, match="is the run's own"):
            runmgr.average_checkpoints(run.run_dir, run.path(name), best=2, overwrite=True)
    with pytest.raises(InvalidInput, match="is the run's own"):
        runmgr.average_checkpoints(run.run_dir, best=2, overwrite=True)
    objects = run.run_dir / ".runmgr" / "checkpoints"
    with pytest.raises(InvalidInput, match="keeps its own files"):
        runmgr.average_checkpoints(run.run_dir, objects / "soup.pth", best=2)
    assert run.path("average").read_bytes() == recorded
    assert runmgr.average_checkpoints(run.run_dir, run.run_dir / "best_two.pth", best=2).is_file()
    (path,) = saved(tmp_path, [weights(0)])
    with pytest.raises(InvalidInput, match="one of the members"):
        runmgr.average_checkpoints([path], path, overwrite=True)


def test_a_live_run_can_be_averaged_elsewhere_only(tmp_path):
    with runmgr.start_run("live", monitor="acc") as run:
        run.save({"net": Net()}, epoch=1, metrics={"acc": 1.0})
        with pytest.raises(RunBusy, match=f"run {run.run_id} is being trained by pid {os.getpid()}"):
            runmgr.average_checkpoints("live", best=1)
        assert len(averaged("live", tmp_path / "soup.pth", best=1)["members"]) == 1
    assert runmgr.average_checkpoints("live", best=1) == run.path("average")


def test_a_run_that_comes_to_life_meanwhile_keeps_its_name(trained, monkeypatch):
    run, _ = trained()
    resumed = []

    def resume(_done, _total):
        if not resumed:
            resumed.append(runmgr.start_run("digits", run_id=run.run_id, monitor="acc"))

    with pytest.raises(RunBusy):
        runmgr.average_checkpoints(run.run_id, best=2, on_progress=resume)
    resumed[0].finish()
    assert [name for name in left(run.run_dir) if "average" in name] == []


def test_super_gradients_checkpoints_and_bare_state_dicts_are_averaged(tmp_path):
    states = [weights(seed) for seed in range(3)]
    for state, ema in zip(states, [weights(seed) for seed in (10, 11, 12)], strict=True):
        folder = tmp_path / f"RUN_{len(left(tmp_path))}"
        folder.mkdir()
        torch.save({"net": state, "ema_net": ema, "acc": 0.5, "optimizer_state_dict": {}}, folder / "ckpt_epoch_3.pth")
    runs = [tmp_path / name for name in left(tmp_path)]
    assert_within_one_ulp(averaged(runs, tmp_path / "net.pth", epochs=[3])["net"], mean(states))
    found = averaged([run / "ckpt_epoch_3.pth" for run in runs], tmp_path / "ema.pth", key="ema_net")["net"]
    assert_within_one_ulp(found, mean([weights(seed) for seed in (10, 11, 12)]))
    torch.save(states[0], tmp_path / "bare.pth")
    assert_within_one_ulp(
        averaged([tmp_path / "bare.pth", runs[1] / "ckpt_epoch_3.pth"], tmp_path / "mixed.pth")["net"], mean(states[:2])
    )


def test_a_checkpoint_counts_once_under_however_many_names(trained, tmp_path):
    run, _ = trained()
    names = [run.path(name) for name in ("latest", "best", "ckpt_epoch_5.pth", "ckpt_epoch_6.pth", "ckpt_epoch_1.pth")]
    assert [one["epoch"] for one in averaged(names, tmp_path / "soup.pth")["members"]] == [6, 5, 1]


def test_models_that_do_not_match_are_one_error_that_lists_the_keys(tmp_path):
    one = {f"layer{number}": torch.zeros(3) for number in range(15)}
    other = {key: tensor.half() for key, tensor in one.items() if key != "layer0"} | {"new": torch.zeros(1)}
    third = one | {"layer1": torch.zeros(4)}
    paths = saved(tmp_path, [one, other, third])
    with pytest.raises(InvalidInput) as raised:
        runmgr.average_checkpoints(paths, tmp_path / "soup.pth")
    text = str(raised.value)
    assert "the 3 members do not hold the same model: 'layer0' is float32 (3,) in" in text
    assert f"'layer1' is float32 (3,) in {paths[0]}, float16 (3,) in {paths[1]}, float32 (4,) in {paths[2]}" in text
    assert f"'layer2' is float32 (3,) in {paths[0]} and 1 more, float16 (3,) in {paths[1]}" in text
    assert "'layer9'" in text
    assert "'layer10'" not in text
    assert "; and 6 more keys" in text
    assert left(tmp_path) == ["0.pth", "1.pth", "2.pth"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_member_that_is_not_finite_is_named(tmp_path, value):
    states = [weights(seed) for seed in range(3)]
    states[1]["large"] = states[1]["large"].clone()
    states[1]["large"][650, 3] = value
    with pytest.raises(InvalidInput, match=r"1\.pth holds values that are not finite in 'large'; leave it out"):
        runmgr.average_checkpoints(saved(tmp_path, states), tmp_path / "soup.pth")
    assert left(tmp_path) == ["0.pth", "1.pth", "2.pth"]


def test_damage_that_makes_a_value_infinite_is_told_as_damage(tmp_path):
    paths = saved(tmp_path, [{"w": torch.ones(1 << 19)} for _ in range(3)])
    (entry,) = (entry for entry in _records(paths[1]) if "/data/" in entry.name)
    paths[1].chmod(0o644)
    with paths[1].open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\xff" * 8)
    with pytest.raises(CheckpointCorrupt, match=r"1\.pth is damaged: the record '1/data/0'"):
        runmgr.average_checkpoints(paths, tmp_path / "soup.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.complex128], ids=str)
def test_other_dtypes_are_averaged_too(tmp_path, dtype):
    paths = saved(tmp_path, [{"w": torch.full((9,), value).to(dtype)} for value in (1.0, 2.0, 3.0)])
    found = averaged(paths, tmp_path / "soup.pth")["net"]["w"]
    assert (found.dtype, found.to(torch.complex64).tolist()) == (dtype, [2.0] * 9)


def test_a_mask_of_infinities_that_all_members_have_stays(tmp_path):
    mask = torch.full((8, 8), -math.inf).triu(1)
    paths = saved(tmp_path, [{"mask": mask, "w": torch.ones(2) * seed} for seed in range(3)])
    assert torch.equal(averaged(paths, tmp_path / "soup.pth")["net"]["mask"], mask)


def test_each_damaged_byte_that_is_averaged_is_named_by_file_and_record(tmp_path):
    states = [weights(0), weights(1)]
    paths = saved(tmp_path, states)
    for path in paths:
        averaging = [entry for entry in _records(path) if "/data/" in entry.name or entry.name.endswith("data.pkl")]
        for entry in averaging:
            if not entry.size_bytes:
                continue
            is_read = path == paths[1] or entry.size_bytes not in {8, 5, 80}  # integers come from the newest alone
            position = entry.start + entry.size_bytes - 1
            damage(path, position)
            if is_read:
                with pytest.raises(CheckpointCorrupt, match=rf"{path.name} is damaged: the record '{entry.name}'"):
                    runmgr.average_checkpoints(paths, tmp_path / "soup.pth")
            damage(path, position)
    assert left(tmp_path) == ["0.pth", "1.pth"]
    runmgr.average_checkpoints(paths, tmp_path / "soup.pth")


def test_a_member_that_is_not_what_its_run_recorded_is_refused(trained, tmp_path):
    run, _ = trained()
    best = run.run_dir / ".runmgr/checkpoints/0001-000005.pth"
    best.unlink()
    torch.save({"net": Net().state_dict()}, best)
    with pytest.raises(CheckpointCorrupt, match="not the ones that were saved"):
        runmgr.average_checkpoints(run.run_id, tmp_path / "soup.pth", best=2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "nothing to average"),
        (["{0}", "nothing.pth"], {}, r"nothing\.pth is no checkpoint file; of a run say which"),
        (["{0}"], {"output": "missing/soup.pth"}, "there is no directory"),
        (["{0}"], {"output": "."}, "is a directory"),
        (["{0}"], {"output": None}, "an average of files needs a place of its own"),
        (["{0}"], {"device": "tpu"}, "give 'cpu' or 'cuda'"),
        (["{0}"], {"device": "cuda:77"}, "torch sees"),
        (["{0}"], {"key": "ema"}, "it has 'net'"),
        (["{0}"], {"best": 2, "epochs": [1]}, "exclude each other"),
        (["{0}"], {"best": 0}, "at least 1"),
        (["{0}"], {"epochs": ["1"]}, "whole numbers"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(tmp_path, monkeypatch, trained, arguments, options, message):
    monkeypatch.chdir(tmp_path)
    (path,) = saved(tmp_path, [weights(0)])
    if "best" in options or "epochs" in options:
        path = trained()[0].run_dir
    before = left(tmp_path)
    with pytest.raises((InvalidInput, CheckpointNotFound), match=message):
        runmgr.average_checkpoints([one.format(path) for one in arguments], **{"output": "soup.pth"} | options)
    assert left(tmp_path) == before


def test_a_disk_that_is_or_becomes_full_leaves_nothing(tmp_path, monkeypatch):
    paths = saved(tmp_path, [weights(0), weights(1)])

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        runmgr.average_checkpoints(paths, tmp_path / "soup.pth")

    with pytest.raises(OSError, match=r"File too large.*soup\.pth"):
        in_child(limited)
    monkeypatch.setattr(atomic, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match=r"the average needs \d\.\d MB, 0\.0 MB are free") as raised:
        runmgr.average_checkpoints(paths, tmp_path / "soup.pth")
    assert raised.value.errno == errno.ENOSPC
    assert left(tmp_path) == ["0.pth", "1.pth"]


def test_threads_and_torchs_own_setting_are_as_before(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        runmgr.average_checkpoints(saved(tmp_path, [weights(0), weights(1)]), tmp_path / "soup.pth")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# Ends of the process, on a real one: the first progress says that it is in the middle of the file.
MIDDLE = """
import pathlib, signal, sys, time
import runmgr
from runmgr import cli
from runmgr.worker import saving, soup
real = soup.average_checkpoints
def slow(*given, on_progress, **options):
    def progress(done, total):
        if done > total / 2:
            pathlib.Path(sys.argv[1]).touch()
            time.sleep(0.2)
        on_progress(done, total)
    return real(*given, on_progress=progress, **options)
slow.__name__ = real.__name__
runmgr.average_checkpoints = soup.average_checkpoints = slow
sys.exit(cli.main(sys.argv[2:]))
"""


def _stopped_in_the_middle(folder, number, *arguments):
    mark = folder / "middle"
    command = [sys.executable, "-c", MIDDLE, str(mark), "average", *arguments]
    with subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    mark.unlink()
    return process.returncode, err


def test_ctrl_c_is_status_130_without_a_traceback_and_leaves_nothing(tmp_path):
    paths = saved(tmp_path, [{f"w{number}": torch.ones(1 << 20) for number in range(8)} for _ in range(3)])
    output = tmp_path / "soup.pth"
    assert _stopped_in_the_middle(tmp_path, signal.SIGINT, *map(str, paths), "-o", str(output)) == (130, "")
    assert left(tmp_path) == ["0.pth", "1.pth", "2.pth"]


def test_kill_9_leaves_no_half_average_and_what_was_there_before(tmp_path):
    paths = saved(tmp_path, [{f"w{number}": torch.ones(1 << 20) for number in range(8)} for _ in range(3)])
    output = tmp_path / "soup.pth"
    output.write_bytes(b"before")
    status, _ = _stopped_in_the_middle(tmp_path, signal.SIGKILL, *map(str, paths), "-o", str(output), "--force")
    assert status == -signal.SIGKILL
    assert output.read_bytes() == b"before"
    assert all(atomic.TEMPORARY in name for name in set(left(tmp_path)) - {"0.pth", "1.pth", "2.pth", "soup.pth"})
    assert averaged(paths, output, overwrite=True)["net"]["w3"][0] == 1


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Ten members of 64 MiB, in tensors of 16."""
    folder = tmp_path_factory.mktemp("large")
    return saved(
        folder, [{f"w{number}": torch.full((4 << 20,), float(seed)) for number in range(4)} for seed in range(10)]
    )


LIMITED = """
import resource, sys
import torch
import runmgr
import runmgr.worker.soup

what, more_mib, way, output, *paths = sys.argv[1:]
field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[what]
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith(field)) << 10
resource.setrlimit(getattr(resource, what), (used + (int(more_mib) << 20), resource.RLIM_INFINITY))
if way == "ours":
    runmgr.average_checkpoints(paths, output)
elif way == "map all":
    kept = [torch.load(path, mmap=True) for path in paths]
elif way == "one by one":
    total = {}
    for path in paths:
        for key, tensor in torch.load(path)["net"].items():
            total[key] = total.get(key, 0) + tensor.double()
"""


@pytest.mark.parametrize(
    ("what", "more_mib", "naive"), [("RLIMIT_DATA", 160, "one by one"), ("RLIMIT_AS", 480, "map all")]
)
def test_memory_stays_small_where_other_ways_run_out_of_it(large, tmp_path, what, more_mib, naive):
    """In processes of their own: what the tests before have freed would be theirs."""
    output = tmp_path / "soup.pth"

    def tried(way):
        arguments = [what, str(more_mib), way, str(output), *map(str, large)]
        return processes.run(sys.executable, "-c", LIMITED, *arguments)

    done = tried("ours")
    assert done.returncode == 0, done.stderr
    found = torch.load(output, weights_only=True, mmap=True)["net"]
    assert [float(found[key][-1]) for key in found] == [4.5] * 4
    done = tried(naive)
    assert done.returncode == 1
    assert "memory" in done.stderr


def test_the_command_prints_what_went_in(trained, tmp_path, capsys):
    run, _ = trained()
    output = tmp_path / "soup.pth"
    assert cli.main(["average", "digits", "--best", "10", "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["EPOCH", "STEP", "METRIC", "RUN", "FILE"]
    assert lines[1].split() == ["1", "10", "0.1", run.run_id, "0001-000001.pth"]
    assert lines[-1] == f"the average of these 6 is {output}"
    assert err == "runmgr: only 6 of the 10 best are still there\n"
    assert cli.main(["average", "digits", "--epochs", "2,5", "-o", str(output), "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(output)
    assert [member["epoch"] for member in told["members"]] == [2, 5]
    assert cli.main(["average", "digits", "--epochs", "2", "-o", str(output)]) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [(), ("a.pth", "--best", "0"), ("a.pth", "--epochs", "1,x"), ("r", "--best", "1", "--epochs", "2")]
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["average", *arguments])
    assert exit_.value.code == 2
    capsys.readouterr()


@contextlib.contextmanager
def memory_limit(size_bytes):
    """A control group, of version 1 or 2, whose processes have so much memory, page cache included; yields where to join."""
    top = Path("/sys/fs/cgroup")
    old = (top / "memory").is_dir()
    group = (top / "memory" if old else top) / f"runmgr-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(size_bytes))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@pytest.mark.long
@pytest.mark.needs("root")
def test_ten_large_checkpoints_in_a_control_group_with_the_memory_of_one_and_a_half(tmp_path):
    mib = int(os.environ.get("RUNMGR_SOUP_MIB", "512"))
    paths = []
    for seed in range(10):
        state = {f"w{number}": torch.full((mib << 14,), float(seed)) for number in range(16)}
        paths += saved(tmp_path, [state])
        paths[-1] = paths[-1].rename(tmp_path / f"member{seed}.pth")
    output = tmp_path / "soup.pth"
    with memory_limit(3 * mib << 19) as join:
        code = f"import os, sys; open({str(join)!r}, 'w').write(str(os.getpid())); from runmgr import cli; sys.exit(cli.main())"
        command = [sys.executable, "-c", code, "average", *map(str, paths), "-o", str(output)]
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, timeout=3600, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    found = torch.load(output, weights_only=True, mmap=True)["net"]
    assert all(float(tensor[-1]) == 4.5 for tensor in found.values())
