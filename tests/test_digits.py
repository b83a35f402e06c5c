"""The main job, end to end: `bash scripts/launch.sh` on real data."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from processes import REPOSITORY, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runmgr
from runmgr.examples import digits

FILES = (
    "ckpt_latest.pth", "ckpt_best.pth", "ckpt_epoch_10.pth", "average_model.pth", "run.json", "config.json",
    ".runmgr/token", ".runmgr/manifest.json", ".runmgr/attempts/0001.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    root = tmp_path_factory.mktemp("launched")
    done = run("bash", str(REPOSITORY / "scripts/launch.sh"), RUNMGR_CKPT_ROOT_DIR=str(root))
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def _run_dir(launched):
    root, _ = launched
    return root / "digits" / str(runmgr.get_latest_run_id("digits", root))


def test_launching_without_arguments_trains_to_97_percent_and_says_where(launched):
    _, output = launched
    last, averaged = map(float, re.findall(r"(\d+\.\d+)%", output))
    assert last >= 97
    assert averaged >= 97
    assert f"run directory: {_run_dir(launched)}\n" in output


def test_the_run_directory_holds_every_file_of_the_map(launched):
    path = _run_dir(launched)
    assert [name for name in FILES if not (path / name).exists()] == []
    assert len(list(path.glob("events.out.tfevents.*"))) == 1
    assert sorted(re.sub(r"\d{8}_\d{6}_\d{6}", "T", log.name) for log in path.glob("log_*")) == [
        "log_T.txt",
        "log_T_rank1.txt",
    ]
    assert not (path / ".runmgr/lease").exists(), "only a live run has a lease"
    experiment = path.parent / ".runmgr"
    assert {"create.lock", "last_run_id", "launches"} <= set(os.listdir(experiment))
    assert os.listdir(experiment / "last_run_id") == [path.name]


def test_the_record_says_who_ran_what_where_and_how_it_ended(launched):
    record = json.loads((_run_dir(launched) / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["world_size"] == sum(len(host["ranks"]) for host in record["hosts"])
    assert "runmgr.examples.digits" in record["argv"]
    assert record["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert re.fullmatch(r"[0-9a-f]{40}", record["git"]["commit"])
    assert record["best"]["metrics"]["val/accuracy"] >= record["latest"]["metrics"]["val/accuracy"]


def test_every_checkpoint_loads_with_weights_only_into_a_bare_model(launched):
    paths = sorted(_run_dir(launched).rglob("*.pth"))
    assert len(paths) > len(FILES)
    for path in paths:
        digits.build_model().load_state_dict(torch.load(path, weights_only=True)["net"])
        assert not path.stat().st_mode & 0o222, "nobody writes into a checkpoint"


def test_the_average_is_the_mean_of_its_ten_members(launched):
    path = _run_dir(launched)
    saved = torch.load(path / "average_model.pth", weights_only=True)
    assert len(saved["members"]) == 10
    members = [
        torch.load(path / ".runmgr/checkpoints" / member["checkpoint"], weights_only=True)["net"]
        for member in saved["members"]
    ]
    mean = torch.stack([member["0.weight"].double() for member in members]).mean(0).float()
    assert torch.equal(saved["net"]["0.weight"], mean)


def test_tensorboard_has_every_epoch(launched):
    events = EventAccumulator(str(_run_dir(launched))).Reload()
    steps = [event.step for event in events.Scalars("val/accuracy")]
    assert len(steps) == 30
    assert steps == sorted(set(steps))


def test_a_second_launch_makes_a_second_run_with_the_average_that_is_asked_for(launched):
    root, _ = launched
    (first,) = runmgr.list_runs("digits", root)
    done = run(
        "bash", str(REPOSITORY / "scripts/launch.sh"), "--nproc-per-node=1", "-m", "runmgr.examples.digits",
        "--epochs=1", "--average=exponential",
        RUNMGR_CKPT_ROOT_DIR=str(root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "for the ExponentialAverage" in done.stdout
    second, again = runmgr.list_runs("digits", root)
    assert again == first
    assert second.run_id > first.run_id
