"""What a person sees on a terminal, and what a pipe gets instead."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from processes import clean_environment
from terminals import on_terminal, plain

import runmgr


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An experiment of two runs whose curves are known."""
    root = tmp_path_factory.mktemp("terminal") / "checkpoints"
    for rate in (0.1, 0.2):
        with runmgr.start_run(
            "digits", ckpt_root_dir=root, config={"lr": rate}, monitor="val/acc", tags=["naïve 夜"]
        ) as run:
            for step in range(1, 6):
                run.log_scalars({"val/acc": rate * step, "train/loss": (step - 3) ** 2 * rate}, step=step)
            run.save({"net": torch.nn.Linear(1, 1)}, epoch=5, step=5, metrics={"val/acc": rate * 5})
    return root


@pytest.fixture
def ids(root):
    return sorted(os.listdir(root / "digits"))[-2:]


def test_show_draws_the_monitored_metric_and_the_loss(root, ids):
    status, seen = on_terminal("show", "digits/best", "--root", str(root))
    text = plain(seen)
    assert status == 0
    assert re.search(rf"^run +{ids[1]}$", text, re.MULTILINE)
    assert "val/acc: min 0.2 at step 1, max 1 at step 5, last 1 at step 5\n" in text
    assert "train/loss: min 0 at step 3, max 0.8 at step 1, last 0.8 at step 5\n" in text
    assert len(re.findall(r"[\u2801-\u28ff]", text)) > 40, "two curves of dots"
    assert "(step)" in text
    assert "\x1b[36m" in seen, "in colour"


def test_compare_lays_the_curves_over_each_other(root, ids):
    status, seen = on_terminal("compare", "digits@-1", "digits@-2", "--root", str(root), columns=140)
    text = plain(seen)
    assert status == 0
    assert re.search(r"config lr +0\.2 +0\.1 *\n", text)
    for run_id, most in zip(ids, ("0.5", "1"), strict=True):
        assert re.search(rf"val/acc {run_id}: .*max {most} at step 5", text)
    assert {"\x1b[36m", "\x1b[33m"} <= set(re.findall(r"\x1b\[3\dm", seen)), "each in its own colour"


def test_without_colours_curves_are_told_apart_by_letters(root, ids):
    status, seen = on_terminal("compare", "digits@0", "digits@1", "--root", str(root), columns=120, NO_COLOR="1")
    assert status == 0
    assert not re.search(r"\x1b\[[0-9;]*3\d", seen), "no colour"
    assert f"val/acc a {ids[0]}" in plain(seen)
    assert f"val/acc b {ids[1]}" in plain(seen)
    picture = plain(seen).partition("(val/acc)")[2].partition("(step)")[0]
    assert {"a", "b"} <= set(picture)


@pytest.mark.parametrize("columns", [200, 80, 40, 20, 5])
def test_a_narrow_terminal_loses_columns_and_says_which_but_never_a_run_id(root, ids, columns):
    status, seen = on_terminal("ls", "digits", "--root", str(root), columns=columns)
    lines = plain(seen).splitlines()
    assert status == 0
    assert [line.split()[0] for line in lines[1:3]] == ids[::-1]
    assert all(len(line) <= max(columns, 26) for line in lines[:3])
    left_out = [line for line in lines if line.startswith("too narrow for")]
    assert len(left_out) == (columns < 200)
    assert ("STATUS" in lines[0]) == (columns >= 40)


def test_a_pipe_gets_neither_colours_nor_pictures_and_loses_nothing(root, ids):
    for arguments in (["ls", "digits"], ["show", "digits"], ["compare", *(f"digits/{run_id}" for run_id in ids)]):
        done = subprocess.run(
            [sys.executable, "-m", "runmgr.cli", *arguments, "--root", str(root)], capture_output=True, text=True,
            env=clean_environment(COLUMNS="20", FORCE_COLOR="1"),
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert ids[1] in done.stdout
        assert "naïve 夜" in done.stdout or arguments[0] == "compare"
        assert not re.search(r"[\x1b\u2801-\u28ff]", done.stdout)


def test_a_terminal_that_knows_nothing_gets_plain_letters(root, ids):
    for environ in (
        {"TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ):
        status, seen = on_terminal("ls", "digits", "--root", str(root), **environ)
        assert (status, ids[1] in seen) == (0, True)
        assert ("\\u591c" in seen) == ("PYTHONIOENCODING" in environ)
    status, seen = on_terminal("show", "digits", "--root", str(root), PYTHONIOENCODING="ascii")
    assert (status, "max 1 at step 5" in seen) == (0, True)


def test_a_long_look_at_many_runs_shows_how_far_it_is(tmp_path):
    experiment = tmp_path / "many"
    for number in range(3000):
        (experiment / f"RUN_20260101_{number:06d}_000000").mkdir(parents=True)
    code = (
        "import sys; from runmgr import cli; from runmgr.cli import tables; tables._PATIENCE_S = 0; "
        f"sys.exit(cli.main(['ls', 'many', '--tag', 'none', '--root', {str(tmp_path)!r}]))"
    )
    status, seen = on_terminal(code=code)
    assert status == 0
    assert "reading runs" in seen
    assert "3000/3000" in plain(seen)
    assert plain(seen).rstrip().endswith(f"no such runs in {experiment}")
