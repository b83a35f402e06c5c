"""super-gradients' logger over a run: what it is given lies in TensorBoard, the log, or beside the checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_ranks, values
from torch import nn

import runmgr
from runmgr.errors import InvalidInput
from runmgr.integrations.super_gradients import BaseSGLogger, multi_process_safe


def tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = run.run_dir.glob("events.out.tfevents.*")
    return EventAccumulator(str(path), size_guidance={"tensors": 0, "images": 0}).Reload()


def log_of(run):
    (path,) = run.run_dir.glob("log_*.txt")
    return path.read_text()


def test_scalars_lie_under_the_tags_that_super_gradients_writes_and_in_the_log():
    with runmgr.start_run("digits") as run:
        logger = BaseSGLogger(run)
        logger.add_scalar("LR Group 0", torch.tensor(0.5), global_step=3)
        logger.add_scalars({"Train Loss": 1.5, "valid_Accuracy": np.float32(0.25)}, global_step=4)
        logger.add_scalars({"Train Loss": 2})
        logger.flush()
        logger.upload()
        logger.close()
        logger.add_scalar("after close", 1, 5)
        assert logger.local_dir() == str(run.run_dir)
    found = tensorboard(run)
    assert {"lr_group_0", "train_loss", "valid_accuracy", "after_close"} <= set(found.Tags()["scalars"])
    assert [(event.step, event.value) for event in found.Scalars("lr_group_0")] == [(3, 0.5)]
    assert [event.value for event in found.Scalars("train_loss")] == [1.5, 2]
    assert "4: Train Loss: 1.5, valid_Accuracy: 0.25\n" in log_of(run)


def test_texts_pictures_and_distributions_lie_in_tensorboard():
    with runmgr.start_run("digits") as run:
        logger = BaseSGLogger(run)
        logger.add_text("note", "hello", 1)
        logger.add_image("tensor", torch.zeros(3, 4, 5), global_step=1)
        logger.add_image("array", np.zeros((4, 5, 3)), data_format="HWC", global_step=1)
        logger.add_image("colours", Image.new("RGB", (5, 4)), global_step=1)
        logger.add_image("grey", Image.new("L", (5, 4)), global_step=1)
        logger.add_images("several", torch.zeros(2, 3, 4, 5), global_step=1)
        logger.add_histogram("weights", torch.arange(10.0), bins="auto", global_step=1)
        logger.add("number", 7, 2)
        logger.add("text", "seven", 2)
        logger.add("mapping", {"a": 1}, 2)
        with pytest.raises(InvalidInput, match="ndarray"):
            logger.add("array", np.zeros(3))
    found = tensorboard(run)
    assert {"tensor", "array", "colours", "grey"} <= set(found.Tags()["images"])
    assert (found.Images("colours")[0].width, found.Images("colours")[0].height) == (5, 4)
    assert "weights" in found.Tags()["histograms"]
    assert {"note/text_summary", "text/text_summary", "mapping/text_summary"} <= set(found.Tags()["tensors"])
    assert found.Scalars("number")[0].value == 7


def test_figures_graphs_and_videos_are_handed_to_tensorboard(monkeypatch):
    with runmgr.start_run("digits") as run:
        logger = BaseSGLogger(run)
        asked = []

        class Board:
            def __getattr__(self, name):
                return lambda *args, **options: asked.append((name, args, options))

        logger.tensorboard_writer = Board()
        video, figure, model, inputs = torch.zeros(2, 3, 4, 5), object(), nn.Linear(1, 1), torch.zeros(1)
        logger.add_video("clip", video, 1)
        logger.add_figure("plot", figure, 2)
        logger.add_model_graph("graph", model, inputs)
    (_, (_, shown, step), _), plot, graph = asked
    assert (shown.shape, step) == ((1, 2, 3, 4, 5), 1)
    assert plot == ("add_figure", ("plot", figure, 2), {})
    assert graph == ("add_graph", (model, inputs), {})


def test_a_configuration_is_shown_with_its_secrets_masked():
    with runmgr.start_run("digits") as run:
        BaseSGLogger(run).add_config("hyper_params", {"lr": 0.1, "api_key": "s3cret"})
    text = tensorboard(run).Tensors("hyper_params/text_summary")[0].tensor_proto.string_val[0].decode()
    for found in (text, log_of(run)):
        assert '"lr": 0.1' in found
        assert "s3cret" not in found


def test_a_checkpoint_of_any_name_lies_beside_the_others_and_stays():
    with runmgr.start_run("digits") as run:
        logger = BaseSGLogger(run)
        logger.add_checkpoint("teacher", {"net": nn.Linear(1, 1).state_dict()}, global_step=1)
        logger.add_checkpoint(None, {"n": 1}, global_step=7)
        logger.add_checkpoint("teacher.pth", {"n": 2})
        for epoch in (1, 2, 3):
            run.save({"n": epoch}, epoch=epoch)
    names = {path.name for path in run.run_dir.glob("*.pth")}
    assert names == {"teacher.pth", "ckpt_7.pth", "ckpt_latest.pth"}
    assert torch.load(run.path("teacher.pth"), weights_only=True) == {"n": 2}
    assert torch.load(run.path("ckpt_7.pth"), weights_only=True) == {"n": 1}


@pytest.mark.parametrize(
    "tag",
    ["ckpt_latest", "ckpt_best.pth", "ckpt_epoch_3", "average_model.pth", "../x", ".hidden", None],
)
def test_a_checkpoint_under_a_name_of_the_run_or_none_is_refused(tag):
    with runmgr.start_run("digits") as run:
        with pytest.raises(InvalidInput):
            BaseSGLogger(run).add_checkpoint(tag, {"n": 1})
        assert not list(run.run_dir.glob("*.pth"))


def test_what_could_not_be_loaded_again_is_refused():
    with runmgr.start_run("digits") as run:
        with pytest.raises(InvalidInput, match="weights_only"):
            BaseSGLogger(run).add_checkpoint("model", {"net": nn.Linear(1, 1)})
        assert not list(run.run_dir.glob("*.pth"))


def test_a_file_is_copied_into_the_run_and_replaced_as_a_whole(tmp_path, monkeypatch):
    source = tmp_path / "recipe.yaml"
    source.write_text("lr: 1\n")
    with runmgr.start_run("digits") as run:
        logger = BaseSGLogger(run)
        logger.add_file(source)
        source.write_text("lr: 2\n")
        monkeypatch.chdir(tmp_path)
        logger.add_file("recipe.yaml")
        logger.add_file(run.run_dir / "recipe.yaml")
        for name in ("run.json", "config.json", "log_x.txt"):
            with pytest.raises(InvalidInput, match="own names"):
                logger.add_file(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            logger.add_file("missing.yaml")
    assert (run.run_dir / "recipe.yaml").read_text() == "lr: 2\n"


def test_a_logger_of_ones_own_extends_it_and_only_rank_0_writes(tmp_path):
    class Tracked(BaseSGLogger):
        def __init__(self, run):
            super().__init__(run)
            self.sent = []

        @multi_process_safe
        def add_scalar(self, tag, scalar_value, global_step=None):
            super().add_scalar(tag, scalar_value, global_step)
            self.sent.append((tag, scalar_value))

    def log(rank, folder):
        (folder / f"code{rank}.py").touch()
        with runmgr.start_run("digits") as run:
            logger = Tracked(run)
            logger.add_scalar("Loss", rank, 1)
            logger.add_scalars({"Other": rank}, 1)
            logger.add_text("note", "x")
            logger.add_config("config", {"a": 1})
            logger.add_checkpoint(f"extra{rank}", {"n": 1})
            logger.add_file(folder / f"code{rank}.py")
            logger.close()
        return logger.sent

    assert values(run_ranks(2, log, tmp_path)) == [[("Loss", 0)], []]
    (info,) = runmgr.list_runs("digits")
    names = sorted(path.name.partition(".out.")[0].partition("_")[0] for path in info.path.iterdir())
    assert names == [".runmgr", "code0.py", "config.json", "events", "extra0.pth", "log", "run.json"]
