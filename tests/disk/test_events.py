"""Curves from events, as TensorBoard itself reads them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from processes import clean_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import runmgr
from runmgr.disk import events


@pytest.fixture
def resumed(root):
    """A run whose second attempt does the steps from 3 on again."""
    with runmgr.start_run("digits") as run:
        for step in range(1, 6):
            run.log_scalars({"loss": 1 / step, "first": 1.0}, step=step)
            if step == 2:
                run.save({"x": 1}, step=step)
    state = {"x": 0}
    with runmgr.start_run("digits", run_id=run.run_id) as run:
        assert run.restore(state).step == 2
        for step in range(3, 8):
            run.log_scalars({"loss": 10 / step}, step=step)
    return run


def test_a_resumed_run_has_one_clean_curve(resumed):
    curves = runmgr.read_scalars("digits")
    assert [point.step for point in curves["loss"]] == list(range(1, 8))
    assert [point.value for point in curves["loss"]] == pytest.approx([1, 1 / 2, *(10 / step for step in range(3, 8))])
    assert [point.step for point in curves["first"]] == [1, 2]


def test_it_is_what_tensorboard_reads(resumed):
    theirs = EventAccumulator(str(resumed.run_dir), size_guidance={"scalars": 0}).Reload()
    ours = runmgr.read_scalars(runmgr.find_run("digits"))
    assert set(ours) == set(theirs.Tags()["scalars"])
    for name, points in ours.items():
        assert [(point.step, point.value, point.time_s) for point in points] == [
            (scalar.step, scalar.value, scalar.wall_time) for scalar in theirs.Scalars(name)
        ]


def test_pictures_and_the_like_are_passed_over_and_both_ways_of_writing_scalars_are_read(tmp_path):
    run = tmp_path / "x" / "RUN_20260101_000000_000000"
    with SummaryWriter(str(run)) as writer:
        writer.add_histogram("weights", torch.ones(3), 1)
        writer.add_text("config", "lr: 0.1")
        writer.add_scalar("old", 0.5, 1)
        writer.add_scalar("new", 0.25, 2, new_style=True)
        writer.add_scalar("exact", 0.125, 3, new_style=True, double_precision=True)
    found = {name: [(point.step, point.value) for point in points] for name, points in runmgr.read_scalars(run).items()}
    assert found == {"old": [(1, 0.5)], "new": [(2, 0.25)], "exact": [(3, 0.125)]}


def test_a_file_cut_anywhere_gives_what_is_whole(resumed):
    (first, second) = events.event_files(resumed.run_dir)
    second.unlink()
    content, counts = first.read_bytes(), []
    for length in range(0, len(content) + 1, 7):
        first.write_bytes(content[:length])
        counts.append(len(runmgr.read_scalars("digits").get("loss", [])))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 5)


def test_reading_curves_needs_neither_torch_nor_numpy(resumed, root):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = sys.modules['tensorflow'] = None; import runmgr; "
        f"print(len(runmgr.read_scalars('digits', {str(root)!r})['loss']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_files_are_in_order_also_past_the_tenth_writer_of_a_process(tmp_path):
    names = [f"events.out.tfevents.1795000000.host.7.{number}" for number in (0, 9, 10)]
    names.append("events.out.tfevents.1795000001.my.host.7.0")
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in events.event_files(tmp_path)] == names
