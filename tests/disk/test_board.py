"""Under which names runs are seen in TensorBoard, and that nothing but their events is linked."""

from __future__ import annotations

import json
import os

import pytest

from runmgr.disk.board import Board
from runmgr.disk.directory import Experiment

DAY = "RUN_20261123_"


def _run(experiment, name, config=None, *, events=1):
    path = experiment.path / name
    (path / ".runmgr").mkdir(parents=True)
    (path / "ckpt_latest.pth").touch()
    for number in range(events):
        (path / f"events.out.tfevents.{number}").touch()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return experiment.run(name)


@pytest.fixture
def experiment(tmp_path):
    return Experiment(tmp_path / "root", "digits")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "folder"


def _names(board, folder):
    board.refresh(folder)
    return [shown.name for shown in board.shown]


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ({"153000_000001": {"lr": 0.1}}, ["1123_153000"]),
        ({"153000_000001": {"lr": 0.1, "seed": 1}, "153001_000002": {"lr": 0.2, "seed": 1}},
         ["1123_153000 lr=0.1", "1123_153001 lr=0.2"]),
        ({"153000_000001": {"lr": 0.1}, "153000_000002": {"lr": 0.1}},
         ["20261123_153000_000001", "20261123_153000_000002"]),
        ({"153000_000001": {"o": {"lr": 1, "name": "a/b" * 30}}, "153001_000001": None, "153002_000001": {"o": {"lr": 2}}},
         ["1123_153000 lr=1 name=a_ba_ba_ba_ba_ba_ba_", "1123_153001", "1123_153002 lr=2"]),
        ({"153000_000001": dict.fromkeys("abcde", 1), "153001_000001": dict.fromkeys("abcde", 2)},
         ["1123_153000 a=1 b=1 c=1", "1123_153001 a=2 b=2 c=2"]),
        ({"153000_000001": {"wört": "🎉" * 99}, "153001_000001": {"wört": "\udcff\n"}},
         ["1123_153000 wört=" + "🎉" * 20, "1123_153001 wört=\ufffd\ufffd"]),
    ],
    ids=["alone", "one setting", "same second", "odd configurations", "many settings", "unicode"],
)  # fmt: skip
def test_runs_are_called_by_their_start_and_by_what_differs(experiment, folder, runs, names):
    for name, config in runs.items():
        _run(experiment, DAY + name, config)
    assert _names(Board([], [experiment], None, 10), folder) == names
    assert sorted(os.listdir(folder)) == sorted(names)


def test_the_year_is_told_where_there_are_several_and_other_programs_names_as_they_are(experiment, folder):
    for name in ("RUN_20251231_235959_000001", "RUN_20260101_000000_000001", "RUN_old"):
        _run(experiment, name)
    names = ["20251231_235959_000001", "20260101_000000_000001", "old"]
    assert _names(Board([], [experiment], None, 10), folder) == names


def test_only_events_are_linked_and_a_name_stays_whatever_comes_later(experiment, folder):
    run = _run(experiment, f"{DAY}153000_000001", {"lr": 0.1})
    (run.path / "loss_train").mkdir()
    board = Board([], [experiment], None, 10)
    assert _names(board, folder) == ["1123_153000"]
    assert sorted(os.listdir(folder / "1123_153000")) == ["events.out.tfevents.0", "loss_train"]
    (run.path / "events.out.tfevents.1").touch()
    _run(experiment, f"{DAY}153001_000001", {"lr": 0.2}, events=0)
    _run(experiment, f"{DAY}153002_000001", {"lr": 0.2})
    assert _names(board, folder) == ["1123_153000", "1123_153002 lr=0.2"]
    assert "events.out.tfevents.1" in os.listdir(folder / "1123_153000")
    run.path.rename(experiment.root / "trash")
    assert _names(board, folder) == ["1123_153002 lr=0.2"]
    assert os.listdir(folder) == ["1123_153002 lr=0.2"]


def test_experiments_stand_in_front_where_there_are_several_also_ones_that_come_later(experiment, folder):
    run = _run(experiment, f"{DAY}153000_000001")
    other = Experiment(experiment.root, "letters")
    board = Board([], [], experiment.root, 10)
    assert _names(board, folder) == ["digits/1123_153000"]
    _run(other, f"{DAY}153000_000001")
    assert _names(board, folder) == ["digits/1123_153000", "letters/1123_153000"]
    assert _names(Board([run], [other], None, 10), folder) == ["digits/1123_153000", "letters/1123_153000"]
    twin = _run(Experiment(experiment.root / "copy", "digits"), f"{DAY}153000_000001")
    assert _names(Board([run, twin], [], None, 10), folder / "twins") == [
        "digits/1123_153000", "digits/1123_153000 RUN_20261123_153000_000001",
    ]  # fmt: skip


def test_the_newest_runs_are_shown_and_the_rest_is_counted(experiment, folder):
    for second in range(5):
        _run(experiment, f"{DAY}15300{second}_000001")
    board = Board([], [experiment], None, 2)
    assert _names(board, folder) == ["1123_153003", "1123_153004"]
    assert board.num_left_out == 3
    assert _names(Board([], [Experiment(experiment.root, "none")], None, 2), folder) == []
