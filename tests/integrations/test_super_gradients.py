"""super-gradients' documented uses of its experiment management, written anew: only the import is another one."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from processes import REPOSITORY, clean_environment, run_ranks, values
from torch import nn

import runmgr
from runmgr.errors import CheckpointNotFound, InvalidInput, RunNotFound
from runmgr.integrations import super_gradients as theirs


def moved(example: str, **names) -> dict:
    """Run an example after changing where it imports from, and return its variables."""
    theirs_import = re.compile(r"^from super_gradients\S* import", flags=re.MULTILINE)
    code, count = theirs_import.subn(f"from {theirs.__name__} import", inspect.cleandoc(example))
    assert count
    names = {"runmgr": runmgr, "torch": torch, "nn": nn} | names
    exec(code, names)
    return names


def train(experiment="digits", epochs=2, **options):
    with runmgr.start_run(experiment, **options) as run:
        for epoch in range(1, epochs + 1):
            run.save({"n": epoch}, epoch=epoch)
    return run


# ------------------------------------------------------------------------------------------------- the module itself


def test_all_is_sorted_and_says_what_the_lazy_table_and_type_checkers_say():
    import ast

    tree = ast.parse(inspect.getsource(theirs))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_checkers = {alias.name: node.module for node in block.body for alias in node.names}
    assert for_checkers == theirs._HOME_OF
    assert sorted(theirs.__all__) == sorted(theirs._HOME_OF) == sorted(dir(theirs))
    for name, home in theirs._HOME_OF.items():
        assert getattr(theirs, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        theirs.Trainer  # noqa: B018


def test_looking_up_imports_no_torch():
    code = (
        f"import sys\nfrom {theirs.__name__} import get_latest_run_id, get_ckpt_local_path, is_run_dir, start_options\n"
        "get_latest_run_id('x'), is_run_dir('RUN_1'), start_options({'resume': True})\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'tensorboard', 'numpy'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# -------------------------------------------------------------------------------------------------------- directories


def test_the_look_ups_of_the_experiment_management_page(root):
    trained = [train().run_id for _ in range(2)]
    found = moved("""
        from super_gradients.common.environment.checkpoints_dir_utils import get_checkpoints_dir_path
        from super_gradients.common.environment.checkpoints_dir_utils import get_latest_run_id

        run_id = get_latest_run_id(experiment_name="digits")
        run_dir = get_checkpoints_dir_path(experiment_name="digits", run_id=run_id)
    """)
    assert found["run_id"] == trained[1]
    assert found["run_dir"] == str(root / "digits" / trained[1])


def test_latest_skips_runs_without_a_checkpoint_and_is_none_without_any(root):
    assert theirs.get_latest_run_id("digits", checkpoints_root_dir=root) is None
    trained = train().run_id
    train(epochs=0)
    assert theirs.get_latest_run_id("digits", checkpoints_root_dir=root) == trained


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RUN_20240102_030405_000006", True),
        ("/a/RUN_1", True),
        ("/a/RUN_1/", True),
        ("/a/RUN_1/b", False),
        ("run_1", False),
    ],
)
def test_a_run_directory_is_known_by_its_name(name, expected):
    assert theirs.is_run_dir(name) is expected


def test_validating_a_run_id_says_what_is_missing_and_creates_nothing(root):
    run_id = train().run_id
    assert theirs.validate_run_id(run_id, "digits") is None
    with pytest.raises(FileNotFoundError, match="RUN_1") as raised:
        theirs.validate_run_id("RUN_1", "digits")
    assert isinstance(raised.value, RunNotFound)
    assert not (root / "digits" / "RUN_1").exists()


def test_paths_of_experiments_and_of_the_root(root):
    assert theirs.get_experiment_dir_path("digits") == str(root / "digits")
    assert theirs.get_project_checkpoints_dir_path() == str(root)
    assert not root.exists()


def test_the_path_of_a_checkpoint_is_the_external_one_the_runs_the_latest_runs_or_the_old_layouts(root):
    (root / "digits").mkdir(parents=True)
    with pytest.raises(RunNotFound, match="no run"):
        theirs.get_ckpt_local_path("digits", "ckpt_best.pth", None)
    old = root / "digits" / "ckpt_best.pth"
    old.touch()
    assert theirs.get_ckpt_local_path("digits", "ckpt_best.pth", None) == str(old)
    first, second = train(), train()
    assert theirs.get_ckpt_local_path("digits", "ckpt_best.pth", "/some/where.pth") == "/some/where.pth"
    assert theirs.get_ckpt_local_path("digits", "ckpt_best.pth", None) == str(second.path("best"))
    assert theirs.get_ckpt_local_path("digits", "a.pth", None, run_id=first.run_id) == str(first.path("a.pth"))


def test_a_generated_id_is_the_same_on_all_ranks_and_a_run_of_its_own_to_go_on_with(root):
    def generate(_rank):
        run_id = theirs.generate_run_id("digits")
        with runmgr.start_run("digits", run_id=run_id) as run:
            run.restore({})
            run.save({"n": 1}, epoch=1)
            return run_id, run.run_id, run.attempt

    found = values(run_ranks(2, generate))
    assert len(set(found)) == 1
    assert found[0][0] == found[0][1]
    assert theirs.get_latest_run_id("digits") == found[0][0]
    assert theirs.generate_run_id("digits") > found[0][0]
    with pytest.raises(InvalidInput, match="experiment_name"):
        theirs.generate_run_id()


# ------------------------------------------------------------------------------------------- training parameters, resume


def test_resume_is_the_latest_run_run_id_that_run_and_resume_path_a_new_one(root):
    first, second = train(monitor="Accuracy"), train(monitor="Accuracy")

    def resume(**training_params):
        with runmgr.start_run("digits", **theirs.start_options(training_params)) as run:
            return run.run_id, run.restore({"n": 0})

    assert resume(resume=True)[0] == second.run_id
    assert resume(resume=True, run_id=first.run_id)[0] == first.run_id
    assert resume(run_id=first.run_id)[0] == first.run_id
    branch, progress = resume(resume_path=str(first.path("latest")))
    assert branch > second.run_id
    assert progress.values == {"n": 2}
    fresh, progress = resume(resume=False, run_id=None, resume_path=None)
    assert fresh > branch
    assert progress.epoch == 0


def test_resume_without_any_run_is_a_new_run():
    with runmgr.start_run("digits", **theirs.start_options({"resume": True})) as run:
        assert not run.resumed


def test_the_epoch_list_the_metric_to_watch_and_the_config():
    training_params = {
        "max_epochs": 5,
        "save_ckpt_epoch_list": [2, 4],
        "metric_to_watch": "loss",
        "greater_metric_to_watch_is_better": False,
    }
    with runmgr.start_run("digits", **theirs.start_options(training_params)) as run:
        for epoch in range(1, training_params["max_epochs"] + 1):
            run.save({"n": epoch}, epoch=epoch, metrics={"loss": abs(epoch - 3)})
    names = sorted(path.name for path in run.run_dir.glob("*.pth"))
    assert names == ["ckpt_best.pth", "ckpt_epoch_2.pth", "ckpt_epoch_4.pth", "ckpt_latest.pth"]
    for name, n in (("ckpt_epoch_2.pth", 2), ("ckpt_epoch_4.pth", 4), ("best", 3), ("latest", 5)):
        assert torch.load(run.path(name), weights_only=True)["n"] == n
    assert json.loads((run.run_dir / "config.json").read_text())["save_ckpt_epoch_list"] == [2, 4]


@pytest.mark.parametrize(
    "params",
    [
        {"resume": True, "resume_path": "a.pth"},
        {"run_id": "RUN_1", "resume_path": "a.pth"},
        {"resume": "RUN_1"},
        {"save_ckpt_epoch_list": ["1"]},
    ],
)
def test_training_parameters_that_contradict_each_other_are_refused(params):
    with pytest.raises(InvalidInput):
        theirs.start_options(params)


# ----------------------------------------------------------------------------------------------------------- averages


def test_the_ten_best_models_are_averaged_and_go_on_after_a_resume(root):
    example = """
        from super_gradients.training.utils.weight_averaging_utils import ModelWeightAveraging

        with runmgr.start_run("digits", resume="latest", monitor="Accuracy") as run:
            averaging = ModelWeightAveraging(
                run.run_dir, greater_is_better=True, metric_to_watch="Accuracy", load_checkpoint=True,
                number_of_models_to_average=2, model=model,
            )
            state = {"net": model, "average": averaging.average}
            run.restore(state)
            for epoch, accuracy in results:
                nn.init.constant_(model.weight, epoch)
                average = averaging.get_average_model(model, validation_results_dict={"Accuracy": accuracy})
                run.save(state, epoch=epoch, metrics={"Accuracy": accuracy})
            run.save_average(averaging.average)
            averaging.cleanup()
    """
    nan = float("nan")
    first = moved(example, model=nn.Linear(1, 1), results=[(1, 0.9), (2, nan), (3, 0.5)])
    assert first["average"]["weight"].item() == 2, "of epochs 1 and 3"
    second = moved(example, model=nn.Linear(1, 1), results=[(5, 0.7), (6, 0.1)])
    assert second["run"].run_id == first["run"].run_id
    assert second["average"]["weight"].item() == 3, "of epochs 1 and 5"
    saved = torch.load(second["run"].path("average"), weights_only=True)
    assert saved["net"]["weight"].item() == 3
    assert [path.name for path in root.rglob("*.pkl")] == []


def test_without_a_finite_metric_there_is_no_average_and_a_warning(caplog):
    averaging = theirs.ModelWeightAveraging("unused", greater_is_better=False, metric_to_watch="loss")
    model = nn.Linear(1, 1)
    assert averaging.get_average_model(model, {"loss": float("inf")}) is None
    assert "no average model yet" in caplog.text
    assert averaging.get_average_model(model, {"loss": 0.5}) is not None


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: theirs.ModelWeightAveraging("x", True, load_checkpoint=True), "model="),
        (lambda: theirs.ModelWeightAveraging("x", True).average, "model="),
        (lambda: theirs.ModelWeightAveraging("x", True).get_average_model(nn.Linear(1, 1), {"f1": 1}), "'acc'"),
        (
            lambda: theirs.ModelWeightAveraging("x", True, model=nn.Linear(1, 1)).get_average_model(nn.Linear(1, 1)),
            "another one",
        ),
    ],
    ids=["load without model", "average without model", "no such metric", "another model"],
)
def test_an_average_that_cannot_be_made_says_why(use, message):
    with pytest.raises(InvalidInput, match=message):
        use()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"decay_type": "constant", "decay": 0.9, "beta": 15}, [0.9, 0.9, 0.9]),
        ({"decay_type": "threshold", "decay": 0.9}, [0.1, 51 / 60, 0.9]),
        (
            {"decay_type": "exp", "decay": 0.9, "beta": 2},
            [0.0, 0.9 * (1 - 0.36787944117144233), 0.9 * 0.8646647167633873],
        ),
    ],
    ids=lambda value: value.get("decay_type") if isinstance(value, dict) else None,
)
def test_an_exponential_average_follows_its_schedule(params, expected):
    names = moved(
        """
        from super_gradients.training.utils.ema import ModelEMA

        ema = ModelEMA.from_params(model, **ema_params)
        decays = []
        for step in (0, 50, 100):
            nn.init.constant_(model.weight, step)
            ema.update(model, step=step, total_steps=100)
            decays.append(ema.average.decay)
        """,
        model=nn.Linear(1, 1),
        ema_params=params,
    )
    assert names["decays"] == pytest.approx(expected)
    first, second = 50 * (1 - expected[1]), 100 * (1 - expected[2])
    before = 0 if expected[0] == 0 else None
    if before is not None:
        assert names["ema"].average.averaged_state_dict()["weight"].item() == pytest.approx(
            first * expected[2] + second
        )


def test_schedules_can_be_added_and_wrong_ones_are_named(monkeypatch):
    model = nn.Linear(1, 1)
    monkeypatch.setitem(theirs.EMA_DECAY_FUNCTIONS, "mine", lambda: lambda decay, step, total: step)
    ema = theirs.ModelEMA.from_params(model, "mine", 0.5)
    ema.update(model, 0, 10)
    with pytest.raises(InvalidInput, match=r"1\.0 at step 1"):
        ema.update(model, 1, 10)
    with pytest.raises(InvalidInput, match="'exp', 'mine'"):
        theirs.ModelEMA.from_params(model, "linear")
    with pytest.raises(InvalidInput, match="another one"):
        ema.update(nn.Linear(1, 1), 0, 10)


# ------------------------------------------------------------------------------------------------------------ weights


class ModelA(nn.Module):
    def __init__(self, out=3):
        super().__init__()
        self.one = nn.Conv2d(3, 2, 5)
        self.two = nn.Conv2d(2, out, 5)


class ModelB(nn.Module):
    """The same weights in the same order, under other names."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 2, 5)
        self.TWO = nn.Sequential(nn.Conv2d(2, 3, 5))


def weights(model):
    return torch.cat([tensor.reshape(-1) for tensor in model.state_dict().values()])


@pytest.fixture
def checkpoint():
    """A run's latest checkpoint of a ModelA, and the model."""
    model = ModelA()
    with runmgr.start_run("digits") as run:
        run.save({"net": model, "acc": 0.5}, epoch=1)
    return run.path("latest"), model


def test_a_checkpoint_is_loaded_into_a_model(checkpoint):
    path, saved = checkpoint
    names = moved(
        """
        from super_gradients.training.utils.checkpoint_utils import load_checkpoint_to_model

        found = load_checkpoint_to_model(net=model, ckpt_local_path=path)
        only = load_checkpoint_to_model(net=model, ckpt_local_path=path, load_weights_only=True)
        """,
        model=(model := ModelA()),
        path=path,
    )
    assert torch.equal(weights(model), weights(saved))
    assert names["found"]["acc"] == 0.5
    assert set(names["only"]) == {"net"}


def test_by_order_and_shape_the_weights_of_other_names_are_loaded(checkpoint):
    path, saved = checkpoint
    model = ModelB()
    moved(
        """
        from super_gradients.training.utils.checkpoint_utils import load_checkpoint_to_model
        from super_gradients.common.data_types import StrictLoad

        load_checkpoint_to_model(net=model, ckpt_local_path=path, strict=StrictLoad.NO_KEY_MATCHING)
        """,
        model=model,
        path=path,
    )
    assert torch.equal(weights(model), weights(saved))


@pytest.mark.parametrize("mode", [theirs.StrictLoad.OFF, False])
def test_off_loads_what_has_the_same_name(checkpoint, mode):
    path, saved = checkpoint
    model = ModelB()
    before = model.TWO[0].weight.clone()
    theirs.load_checkpoint_to_model(model, path, strict=mode)
    assert torch.equal(model.one.weight, saved.one.weight)
    assert torch.equal(model.TWO[0].weight, before)


def test_key_matching_skips_other_shapes_and_names_them(checkpoint, caplog):
    path, saved = checkpoint
    model = ModelA(out=4)
    before = model.two.weight.clone()
    theirs.load_checkpoint_to_model(model, path, strict=theirs.StrictLoad.KEY_MATCHING)
    assert torch.equal(model.one.weight, saved.one.weight)
    assert torch.equal(model.two.weight, before)
    assert "loaded 2 of 4 tensors" in caplog.text
    assert "two.weight" in caplog.text
    other = ModelA(out=4)
    theirs.transfer_weights(other, saved.state_dict())
    assert torch.equal(other.one.weight, saved.one.weight)


@pytest.mark.parametrize(
    ("model", "mode", "message"),
    [
        (ModelB, theirs.StrictLoad.ON, "no 'TWO.0.weight'"),
        (ModelB, True, "no 'TWO.0.weight'"),
        (lambda: ModelA(4), theirs.StrictLoad.ON, r"'two.weight' has the shape \(3, 2, 5, 5\)"),
        (lambda: ModelA(4), theirs.StrictLoad.OFF, r"'two.weight' has the shape \(3, 2, 5, 5\)"),
        (lambda: ModelA(4), theirs.StrictLoad.NO_KEY_MATCHING, r"'two.weight' \(3, 2, 5, 5\) would become"),
        (lambda: nn.Linear(1, 1), theirs.StrictLoad.NO_KEY_MATCHING, "4 tensors and the model 2"),
        (lambda: nn.Linear(1, 1), theirs.StrictLoad.KEY_MATCHING, "none of the weights"),
        (lambda: nn.Linear(1, 1), theirs.StrictLoad.OFF, "none of the weights"),
        (ModelA, "loose", "StrictLoad.OFF"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_the_model_stays_as_it_was(checkpoint, model, mode, message):
    path, _ = checkpoint
    net = model()
    before = weights(net).clone()
    with pytest.raises(InvalidInput, match=message):
        theirs.load_checkpoint_to_model(net, path, strict=mode)
    assert torch.equal(weights(net), before)


def test_the_exponential_average_is_loaded_instead_of_the_model(tmp_path):
    model = ModelA()
    ema = theirs.ModelEMA.from_params(model, "constant", 0.5)
    expected = weights(model) / 2
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    ema.update(model, 0, 1)
    with runmgr.start_run("digits") as run:
        run.save({"net": model, "ema_net": ema.average}, epoch=1)
    theirs_too = tmp_path / "old.pth"
    torch.save({"net": model.state_dict(), "ema_net": ema.average.averaged_state_dict()}, theirs_too)
    for path in (run.path("latest"), theirs_too):
        net = ModelA()
        theirs.load_checkpoint_to_model(net, path, load_ema_as_net=True, strict=True)
        assert torch.allclose(weights(net), expected)
    torch.save({"net": model.state_dict()}, theirs_too)
    with pytest.raises(InvalidInput, match="no 'ema_net'"):
        theirs.load_checkpoint_to_model(ModelA(), theirs_too, load_ema_as_net=True)


def test_the_backbone_alone_old_prefixes_and_bare_state_dicts(tmp_path):
    backbone = ModelA()
    path = tmp_path / "backbone.pth"
    torch.save({f"module.{key}": tensor for key, tensor in backbone.state_dict().items()}, path)
    model = nn.Module()
    model.backbone, model.head = ModelA(), nn.Linear(1, 1)
    theirs.load_checkpoint_to_model(model, path, load_backbone=True, strict=True)
    assert torch.equal(weights(model.backbone), weights(backbone))
    with pytest.raises(InvalidInput, match="backbone"):
        theirs.load_checkpoint_to_model(ModelA(), path, load_backbone=True)


def test_a_file_that_is_not_there_or_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointNotFound, match="download it first"):
        theirs.read_ckpt_state_dict("https://example.org/a.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(InvalidInput, match="list"):
        theirs.read_ckpt_state_dict(tmp_path / "list.pth")


def test_a_cyclic_scheduler_is_saved_and_goes_on():
    def state():
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=4)
        return {"net": model, "optimizer_state_dict": optimizer, "torch_scheduler_state_dict": scheduler}

    def go_on(state):
        state["optimizer_state_dict"].step()
        state["torch_scheduler_state_dict"].step()
        return state["torch_scheduler_state_dict"].get_last_lr()

    saved, restored = state(), state()
    go_on(saved)
    with runmgr.start_run("digits") as run:
        run.save(saved, epoch=1)
    with runmgr.start_run("digits", resume="latest") as run:
        run.restore(restored)
    assert go_on(restored) == go_on(saved)


HYDRA = """
import hydra
from hydra.core.hydra_config import HydraConfig

import runmgr
from runmgr.integrations.super_gradients import BaseSGLogger, start_options


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(cfg):
    with runmgr.start_run("digits", **start_options(cfg.training_params) | {"config": cfg}) as run:
        BaseSGLogger(run).add_file(f"{HydraConfig.get().runtime.output_dir}/.hydra/overrides.yaml")


main()
"""


@pytest.mark.long
def test_a_configuration_of_hydra_is_the_runs_own_and_its_overrides_are_known(tmp_path, root):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text(
        "lr: 0.1\ntraining_params:\n  lr: ${lr}\n  save_ckpt_epoch_list: [1, 2]\n  resume: false\n"
    )
    script = tmp_path / "train.py"
    script.write_text(HYDRA)
    environ = clean_environment(RUNMGR_CKPT_ROOT_DIR=str(root))
    done = subprocess.run(
        [sys.executable, str(script), "lr=0.5"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (info,) = runmgr.list_runs("digits")
    assert json.loads((info.path / "config.json").read_text()) == {
        "lr": 0.5,
        "training_params": {"lr": 0.5, "save_ckpt_epoch_list": [1, 2], "resume": False},
    }
    assert "lr=0.5" in json.dumps(info.record)
    assert (info.path / "overrides.yaml").read_text() == "- lr=0.5\n"
