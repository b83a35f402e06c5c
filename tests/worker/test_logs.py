"""Rank 0's log tells a training's story: its configuration, and a line for each save."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import runmgr


@pytest.mark.parametrize("block", [True, False])
def test_the_log_has_the_configuration_and_a_line_an_epoch(root, block):
    config = {"lr": 0.1, "name": "größer", "api_key": "hunter2"}
    with runmgr.start_run("x", config=config, monitor="acc") as run:
        state = {"w": torch.zeros(4)}
        run.restore(state)
        for epoch, accuracy in ((1, 0.5), (2, 0.25)):
            run.save(state, epoch=epoch, step=10 * epoch, metrics={"acc": accuracy, "loss": 1 / 3}, block=block)
    (log,) = run.run_dir.glob("log_*.txt")
    text = log.read_text()
    assert 'configuration {"lr": 0.1, "name": "größer", "api_key": "' in text
    assert "hunter2" not in text
    told = [re.sub(r"\d+\.\d+ (s|MB|GB/s)", r"N \1", line) for line in re.findall(r"saved (.*)", text)]
    rest = "N s of training; N MB in N s, N GB/s"
    assert told == [
        f"ckpt_latest.pth, ckpt_best.pth: epoch 1, step 10, acc 0.5, loss 0.333333, {rest}",
        f"ckpt_latest.pth: epoch 2, step 20, acc 0.25, loss 0.333333, {rest}",
    ]


def test_a_run_without_a_configuration_or_metrics_says_nothing_of_them(root):
    with runmgr.start_run("x") as run:
        run.save({"w": torch.zeros(4)}, step=3)
        average = runmgr.RunningAverage(torch.nn.Linear(1, 1))
        average.update()
        run.save_average(average)
    text = next(run.run_dir.glob("log_*.txt")).read_text()
    assert "configuration" not in text
    assert re.search(r"saved ckpt_latest\.pth: step 3, \d\.\d s of training; 0\.0 MB in", text)
    assert re.search(r"saved average_model\.pth: 0\.0 MB in", text)


def test_a_disk_that_refuses_through_tensorflow_costs_scalars_only(root, monkeypatch):
    class ResourceExhaustedError(Exception):
        __module__ = "tensorflow.python.framework.errors_impl"

    def refuse(*_, **__):
        raise ResourceExhaustedError("No space left on device")

    with runmgr.start_run("x") as run:
        with pytest.raises(TypeError):
            run.tensorboard.add_scalar()
        writer = run.tensorboard.writer
        monkeypatch.setattr(writer._get_file_writer().event_writer, "add_event", refuse)
        run.log_scalars({"loss": 1.0}, step=2)
        writer.close()
    text = next(run.run_dir.glob("log_*.txt")).read_text()
    assert "cannot be written: No space left on device; scalars are lost until the next save" in text


def test_the_root_logger_may_have_the_handler_too_and_each_record_is_written_once(root):
    own = logging.getLogger("mine")
    with runmgr.start_run("x") as run:
        logging.getLogger().addHandler(run.log_handler)
        run.logger.info("from the run")
        own.warning("from elsewhere")
        own.warning("from elsewhere")
    text = next(run.run_dir.glob("log_*.txt")).read_text()
    assert [text.count(said) for said in ("from the run", "from elsewhere", "completed")] == [1, 2, 1]
