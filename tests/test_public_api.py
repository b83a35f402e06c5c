"""The names that `import runmgr` gives, and the shape of its main calls."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import clean_environment

import runmgr
from runmgr.errors import RunError

PROMISED = {
    "start_run", "Run", "Progress", "SaveHandle", "Keep", "Checkpoint", "BestAverage", "RunningAverage", "ExponentialAverage",
    "list_runs", "get_run", "best_run", "get_latest_run_id", "get_checkpoints_dir_path", "list_experiments", "RunInfo",
    "recalibrate_batch_norm",
    "find_run", "compare_runs", "Comparison", "read_scalars", "ScalarPoint",
    "average_checkpoints",
}  # fmt: skip


def names_for_type_checkers() -> dict[str, str]:
    """Return name → module from the `if TYPE_CHECKING:` block."""
    tree = ast.parse(Path(runmgr.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_all_is_sorted_and_says_what_the_lazy_table_and_type_checkers_say():
    assert runmgr.__all__ == sorted(set(runmgr.__all__))
    assert set(runmgr.__all__) == set(runmgr._HOME_OF)
    assert names_for_type_checkers() == runmgr._HOME_OF
    assert set(dir(runmgr)) == {*runmgr.__all__, "__version__"}


def test_every_promised_name_and_every_exception_is_there():
    assert set(runmgr.__all__) >= PROMISED

    def tree(kind):
        return {kind.__name__}.union(*map(tree, kind.__subclasses__()))

    assert tree(RunError) <= set(runmgr.__all__)


@pytest.mark.parametrize("name", runmgr.__all__)
def test_a_name_is_the_very_object_of_its_home(name):
    assert getattr(runmgr, name) is getattr(import_module(runmgr._HOME_OF[name]), name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"module 'runmgr' has no attribute 'strat_run'"):
        runmgr.strat_run  # noqa: B018
    assert runmgr.__version__ == version("runmgr")


def test_importing_the_package_and_looking_things_up_loads_no_torch():
    code = (
        "import runmgr, sys\nrunmgr.list_runs, runmgr.Keep, runmgr.RunError, runmgr.__version__\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'tensorboard', 'numpy', 'rich'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


ATTRIBUTES = {
    "run_id", "run_dir", "experiment_name", "rank", "world_size", "is_main", "attempt", "resumed", "config", "logger",
    "log_handler", "tensorboard",
}  # fmt: skip
SIGNATURES = {
    "start_run": (
        "experiment_name, *, ckpt_root_dir=None, config=None, resume='auto', run_id=None, fork_from=None, monitor=None, "
        "mode='max', keep=None, on_save_error='raise', tags=(), capture_console=False, "
        "system_metrics_every_s=30.0, timeout_s=300.0"
    ),
    "Run.save": "self, state, *, epoch=None, step=None, metrics=None, block=True",
    "Run.restore": "self, state, name='latest'",
    "Run.load": "self, name_or_path, map_location='cpu'",
    "Run.log_scalars": "self, scalars, *, step",
    "Run.save_average": "self, average",
    "Run.should_stop": "self",
    "Run.wait": "self",
    "Run.finish": "self",
    "Run.path": "self, name",
    "BestAverage": "model, k=10, *, mode='max'",
    "RunningAverage": "model, *, dtype=torch.float64, overlap_with=None",
    "ExponentialAverage": "model, decay=0.999, *, warmup=0, overlap_with=None",
    "recalibrate_batch_norm": "model, loader",
    "ignore_stop_signals": "worker_id=0",
    "average_checkpoints": (
        "sources, output=None, *, best=None, epochs=(), key=None, ckpt_root_dir=None, device='cpu', overwrite=False, "
        "on_progress=None"
    ),
    "Keep": "*, last=1, best=1, epochs=(), every_n_epochs=None, every_n_steps=None",
    "get_latest_run_id": "experiment_name, ckpt_root_dir=None, *, checkpoints_root_dir=None",
    "list_runs": (
        "experiment_name, ckpt_root_dir=None, *, limit=None, status=(), tags=(), where=(), newer_than_s=None, older_than_s=None"
    ),
    "find_run": "reference, ckpt_root_dir=None",
    "compare_runs": "runs, ckpt_root_dir=None",
    "read_scalars": "run, ckpt_root_dir=None",
    "get_checkpoints_dir_path": "experiment_name, ckpt_root_dir=None, run_id=None, *, checkpoints_root_dir=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_promised_ones(name):
    found = runmgr
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = signature.replace(
        parameters=[parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()],
        return_annotation=signature.empty,
    )
    assert str(bare) == f"({SIGNATURES[name]})"


def test_progress_and_run_have_the_promised_fields():
    assert runmgr.Progress._fields == ("epoch", "step", "metrics", "values", "checkpoint")
    with runmgr.start_run("x") as run:
        assert set(vars(run)) >= ATTRIBUTES, "plain attributes, never collective"
