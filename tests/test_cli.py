"""`runmgr ls | show | path | latest` as a person and as a script use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import runmgr
from runmgr import cli


@pytest.fixture
def runs(root):
    """Two runs of one experiment, the second better, and one of another experiment that failed."""
    paths = []
    for accuracy in (0.5, 0.75):
        with runmgr.start_run("digits", monitor="acc", tags=["night"]) as run:
            run.save({"net": torch.nn.Linear(1, 1)}, epoch=3, step=30, metrics={"acc": accuracy})
        paths.append(run.run_dir)
    with pytest.raises(ZeroDivisionError), runmgr.start_run("wörter 🎉"):
        raise ZeroDivisionError("nothing to divide")
    return paths


def _call(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_latest_prints_the_newest_run_with_a_checkpoint(runs, capsys):
    assert _call(capsys, "latest", "digits") == (0, f"{runs[1].name}\n", "")
    _, out, _ = _call(capsys, "latest", "digits", "--json")
    assert json.loads(out) == {"run_id": runs[1].name, "path": str(runs[1])}


def test_ls_lists_experiments_and_runs_newest_first(runs, capsys):
    _, out, _ = _call(capsys, "ls")
    assert [line.split("  ")[0] for line in out.splitlines()] == ["EXPERIMENT", "digits", "wörter 🎉"]
    _, out, _ = _call(capsys, "ls", "digits")
    assert [line.split() for line in out.splitlines()[1:]] == [
        [runs[1].name, "completed", "1", "3", "30", "acc", "0.75", "night"],
        [runs[0].name, "completed", "1", "3", "30", "acc", "0.5", "night"],
    ]
    _, out, _ = _call(capsys, "ls", "digits", "-n", "1", "--json")
    (listed,) = json.loads(out)
    assert (listed["run_id"], listed["status"], listed["tags"]) == (runs[1].name, "completed", ["night"])


def test_ls_says_when_no_run_has_the_metric_of_a_condition(runs, capsys, root):
    status, out, err = _call(capsys, "ls", "digits", "--where", "ac>0.9")
    assert (status, out) == (0, "")
    assert err == f"no such runs in {root / 'digits'}; none of the newest has saved a metric 'ac'; did you mean acc?\n"
    assert _call(capsys, "ls", "digits", "--where", "acc>0.9")[2] == f"no such runs in {root / 'digits'}\n"
    assert "a metric 'ac'; did you mean acc?" in _call(capsys, "ls", "--where", "ac>0.9")[2]


def test_show_says_how_a_run_ended(runs, capsys):
    status, out, _ = _call(capsys, "show", "digits/best")
    assert status == 0
    assert f"run      {runs[1].name}\npath     {runs[1]}\n" in out
    assert "best     epoch 3, step 30, acc 0.75\n" in out
    failed = runmgr.list_runs("wörter 🎉")[0]
    _, out, _ = _call(capsys, "show", f"wörter 🎉/{failed.run_id}")
    assert "status         failed\nerror          ZeroDivisionError: nothing to divide\n" in out
    _, out, _ = _call(capsys, "show", str(runs[0]), "--json")
    assert json.loads(out)["record"]["tags"] == ["night"]


@pytest.mark.parametrize(
    "reference", ["digits", "digits/latest", "digits/best", "digits/{}", "{}", "{path}", "digits/"]
)
def test_a_run_is_meant_by_many_words(runs, capsys, reference):
    text = reference.format(runs[1].name, path=runs[1])
    assert _call(capsys, "path", text, "best") == (0, f"{runs[1] / 'ckpt_best.pth'}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latest", "digit"), "did you mean digits?"),
        (("show", "digits/RUN_20200101_000000_000000"), "there is no run 'RUN_20200101_000000_000000' in"),
        (("show", "RUN_20200101_000000_000000"), "no experiment in"),
        (("path", "digits", "ckpt_bst.pth"), "did you mean ckpt_best.pth"),
        (("path", "digits", "../../etc/passwd"), "slash"),
        (("show", "../nowhere"), "there is no experiment"),
        (("latest", "a\nb"), "control character"),
        (("latest", "wörter 🎉"), "no run in"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(runs, capsys, arguments, message):
    status, out, err = _call(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("arguments", [("ls", "-n", "0"), ("ls", "--nope"), ("nope",), ("latest",)])
def test_wrong_usage_is_status_2(root, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2


def test_an_empty_or_missing_root_is_no_error(root, capsys):
    assert _call(capsys, "ls") == (0, "", f"no experiments in {root}\n")
    root.mkdir()
    assert _call(capsys, "ls", "--json") == (0, "[]\n", "")


def test_a_reader_that_leaves_early_is_no_error(runs):
    command = f"{sys.executable} -m runmgr.cli ls digits | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "R", "")


def test_looking_up_loads_nothing_heavy(runs):
    code = (
        "import sys; from runmgr import cli; status = cli.main(['latest', 'digits']); "
        "print(sorted({'torch', 'tensorboard', 'numpy', 'rich', 'filelock'} & set(sys.modules)), status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert done.stdout == f"{runs[1].name}\n[] 0\n"
