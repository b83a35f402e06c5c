"""Killed again and again, a training ends with the weights that it would have had in one go."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.utils.tensorboard
from logged_digits import die_at, log_every_step
from processes import REPOSITORY, agent, clean_environment, descendants, end_ranks, kill, start_ranks
from sizes import size
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runmgr
from runmgr.examples import digits

KILLS = size(1, 20)  # of ranks under one torchrun
EPOCHS = {2: 10, 4: 5}
AVERAGED_EPOCHS = 11
STEPS_AN_EPOCH = {2: 19, 4: 10}
SAVES_BEFORE_KILLS = {2: (1, 2, 1, 2, 1, 2), 4: (1, 2, 1)}
DEATHS = [  # the moment, its epoch or step, and the epoch that is saved by then
    [("saved", epoch, epoch) for epoch in range(1, AVERAGED_EPOCHS + 1)],
    [("updated", epoch, epoch - 1) for epoch in range(2, AVERAGED_EPOCHS + 1)],
    [("step", STEPS_AN_EPOCH[2] * epoch + 10, epoch) for epoch in range(1, AVERAGED_EPOCHS)],
]


def _train(rank, root, epochs, seed, warm_up, dies_at):
    """The demo's own main(), as torchrun would start it."""
    sys.argv = ["digits.py", "--epochs", str(epochs), "--resume", "latest"]
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    os.environ["RUNMGR_CKPT_ROOT_DIR"] = str(root)
    random.seed(seed)  # what a process finds there is not part of the run
    torch.manual_seed(seed)
    log_every_step()
    if dies_at is not None:
        die_at(*dies_at)
    if warm_up is not None:
        plain = digits.DistributedDataParallel

        def warmed(model):
            ddp = plain(model)
            warm_up(ddp, torch.zeros(32, 1, 8, 8))
            return ddp

        digits.DistributedDataParallel = warmed
    digits.main()


def _launch(root, folder, ranks, *, epochs=None, warm_up=None, kill_after_saves=None, dies_at=None) -> bool:
    """Train to the end, or kill -9 all ranks a moment after some saves, or one at `dies_at`; True when the end was reached."""
    before = _saves(root)
    with agent() as port:
        given = root, epochs or EPOCHS[ranks], random.randrange(1 << 30), warm_up, dies_at
        pids = start_ranks(ranks, _train, *given, port=port, folder=folder)
        deadline = time.monotonic() + 240
        for _ in range(kill_after_saves or 0):
            while (now := _saves(root)) == before and time.monotonic() < deadline:
                time.sleep(0.005)
            before = now
        return end_ranks(pids, 240 if kill_after_saves is None else random.uniform(0, 0.25))


def _saves(root) -> list[int]:
    return [path.stat().st_ino for path in root.glob("digits/RUN_*/ckpt_latest.pth")]


def _final(root):
    path = root / "digits" / str(runmgr.get_latest_run_id("digits", root))
    return path, torch.load(path / "ckpt_latest.pth", weights_only=True)


def _assert_equal(one, other, where="checkpoint"):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            _assert_equal(left, right, f"{where}[{index}]")
    else:
        assert one == other, where


def _assert_same_training(straight, killed):
    (straight_path, expected), (killed_path, found) = straight, killed
    for key in ("net", "optimizer", "scheduler", "epoch", "step", "metrics"):
        _assert_equal(found[key], expected[key], key)
    assert [states["torch"] for states in found["rng"]] == [states["torch"] for states in expected["rng"]]
    assert [member["metric"] for member in found["average"]["members"]] == [
        member["metric"] for member in expected["average"]["members"]
    ]
    average, expected_average = (
        torch.load(path / "average_model.pth", weights_only=True)["net"] for path in (killed_path, straight_path)
    )
    _assert_equal(average, expected_average, "average")
    best, expected_best = (
        torch.load(path / "ckpt_best.pth", weights_only=True)["metrics"] for path in (killed_path, straight_path)
    )
    assert best == expected_best


def _train_with_kills(root, folder, ranks, warm_up=None):
    for saves in SAVES_BEFORE_KILLS[ranks]:
        assert not _launch(root, folder, ranks, warm_up=warm_up, kill_after_saves=saves)
    assert _launch(root, folder, ranks, warm_up=warm_up)
    (info,) = runmgr.list_runs("digits", root)
    assert info.attempt == len(SAVES_BEFORE_KILLS[ranks]) + 1, "each start went on in the same run"
    events = EventAccumulator(str(info.path)).Reload()
    assert [event.step for event in events.Scalars("step")] == list(range(1, EPOCHS[ranks] * STEPS_AN_EPOCH[ranks] + 1))
    assert len(events.Scalars("val/accuracy")) == EPOCHS[ranks]


@pytest.mark.long
def test_two_ranks_killed_at_random_moments_end_bit_identical(tmp_path):
    assert _launch(tmp_path / "straight", tmp_path, 2)
    _train_with_kills(tmp_path / "killed", tmp_path, 2)
    _assert_same_training(_final(tmp_path / "straight"), _final(tmp_path / "killed"))


def _warm_up_of_the_docs():
    text = (REPOSITORY / "docs/resume.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code, names)
    return names["warm_up"]


def test_four_ranks_end_bit_identical_after_the_warm_up_of_the_docs(tmp_path):
    warm_up = _warm_up_of_the_docs()
    assert _launch(tmp_path / "straight", tmp_path, 4, warm_up=warm_up)
    _train_with_kills(tmp_path / "killed", tmp_path, 4, warm_up)
    _assert_same_training(_final(tmp_path / "straight"), _final(tmp_path / "killed"))


@pytest.mark.long
def test_real_torchrun_killed_with_all_its_ranks_goes_on_at_the_next_start(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "runmgr.examples.digits", "--epochs=8", "--resume=latest",
    ]  # fmt: skip
    environ = clean_environment(RUNMGR_CKPT_ROOT_DIR=str(tmp_path))
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as launch:
        while not list(Path(tmp_path).glob("digits/RUN_*/ckpt_latest.pth")):
            assert launch.poll() is None
            time.sleep(0.05)
        processes = [*descendants(launch.pid), launch.pid]
        kill(processes)
    assert len(processes) == 3
    (lost,) = runmgr.list_runs("digits", tmp_path)
    assert lost.status == "lost"
    assert lost.latest["epoch"] < 8
    subprocess.run(command, env=environ, stderr=subprocess.DEVNULL, check=True)
    (info,) = runmgr.list_runs("digits", tmp_path)
    assert (info.status, info.attempt, info.latest["epoch"]) == ("completed", 2, 8)


@pytest.mark.long
@pytest.mark.parametrize("moments", DEATHS, ids=lambda moments: moments[0][0])
def test_ranks_that_die_at_every_epoch_end_with_the_same_average(tmp_path, moments):
    """One epoch more than the ten that are averaged."""
    assert _launch(tmp_path / "straight", tmp_path, 2, epochs=AVERAGED_EPOCHS)
    killed = tmp_path / "killed"
    for deaths, (moment, number, last_epoch) in enumerate(moments):
        assert not _launch(killed, tmp_path, 2, epochs=AVERAGED_EPOCHS, dies_at=(moment, number, deaths % 2))
        (info,) = runmgr.list_runs("digits", killed)
        assert (info.attempt, info.latest["epoch"]) == (deaths + 1, last_epoch)
    assert _launch(killed, tmp_path, 2, epochs=AVERAGED_EPOCHS)
    _assert_same_training(_final(tmp_path / "straight"), _final(killed))
    members = torch.load(_final(killed)[0] / "average_model.pth", weights_only=True)["members"]
    assert len(members) == 10


@pytest.mark.long
@pytest.mark.timeout(300 + 30 * KILLS)
def test_one_torchrun_whose_ranks_are_killed_again_and_again_ends_bit_identical(tmp_path):
    epochs = 5 * KILLS + 5
    dice = random.Random(KILLS)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={KILLS}",
        "--monitor-interval=0.1", Path(__file__).with_name("logged_digits.py"), f"--epochs={epochs}",
    ]  # fmt: skip
    roots = tmp_path / "straight", tmp_path / "killed"
    assert _launch(roots[0], tmp_path, 2, epochs=epochs)
    environ = clean_environment(RUNMGR_CKPT_ROOT_DIR=str(roots[1]))
    victims = []
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launch:
        try:
            for number in range(KILLS):
                ranks = _ranks_once_they_saved(launch, roots[1], number)
                time.sleep(dice.uniform(0, 0.25))
                victims.append(dice.choice((0, 1)) if number else 0)
                kill([ranks[victims[-1]]])
            assert launch.wait(240 + KILLS) == 0
        finally:
            kill([*descendants(launch.pid), launch.pid])
    assert len(victims) == KILLS
    assert KILLS < 5 or set(victims) == {0, 1}
    (info,) = runmgr.list_runs("digits", roots[1])
    assert (info.status, info.attempt, info.latest["epoch"]) == ("completed", KILLS + 1, epochs)
    _assert_same_training(*map(_final, roots))
    names = [sorted(path.name for path in _final(root)[0].glob("*.pth")) for root in roots]
    assert names[0] == names[1]
    for path in info.path.rglob("*.pth"):
        torch.load(path, weights_only=True)
    events = EventAccumulator(str(info.path)).Reload()
    assert [event.step for event in events.Scalars("step")] == list(range(1, epochs * STEPS_AN_EPOCH[2] + 1))
    assert len(events.Scalars("val/accuracy")) == epochs


def _ranks_once_they_saved(launch, root, restarts):
    """Return the processes of the ranks after so many restarts, by rank, once their attempt has saved."""
    deadline = time.monotonic() + 240
    while not any(_has_saved(path) for path in root.glob(f"digits/RUN_*/.runmgr/attempts/{restarts + 1:04d}.json")):
        assert launch.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    environs = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in descendants(launch.pid)}
    ranks = {rank: pid for pid, names in environs.items() for rank in (0, 1) if f"RANK={rank}".encode() in names}
    assert len(ranks) == 2
    return ranks


def _has_saved(path):
    return bool(json.loads(path.read_bytes())["checkpoints"])
