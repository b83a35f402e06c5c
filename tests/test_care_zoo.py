"""Every command that changes runs, against a zoo of damaged, foreign, live and lost ones: no traceback, the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import zoo
from processes import REPOSITORY, clean_environment

from runmgr import cli
from runmgr.disk import directory


@pytest.fixture
def animals(root):
    with zoo.opened(root) as animals:
        yield animals


def _call(capsysbinary, *arguments):
    status = cli.main(arguments)
    out, err = (text.decode(errors="replace") for text in capsysbinary.readouterr())
    assert status in {0, 1}, arguments
    assert "Traceback" not in err
    return status, out, err


def test_prune_takes_only_what_it_understands_and_tells_why_the_rest_stays(animals, capsysbinary):
    status, out, _ = _call(capsysbinary, "prune", "zoo", "--keep-last", "0", "--yes", "--json")
    told = json.loads(out)
    assert status == 0
    readable = ("unreadable", "unreadable_record") if not os.geteuid() else ()  # to root
    assert set(told["removed"]) == {
        animals[name].name for name in ("whole", "long", "unicode", "escapes", *readable)
    }  # fmt: skip
    kept = {run["run_id"]: run["why"] for run in told["kept"]}
    assert kept[animals.live.name] == "live"
    assert (
        kept[animals.future.name] == "a newer runmgr wrote it (format 99, this one knows 1); upgrade runmgr to use it"
    )
    for name in ("truncated", "foreign", "wrong_types", "record_is_a_directory", "record_loops"):
        assert kept[animals[name].name] == "not made by runmgr, or its run.json cannot be read"
    assert kept["RUN_yesterday"].startswith("not made")
    assert _call(capsysbinary, "prune", "coco", "--keep-last", "0")[1].splitlines()[-1] == "nothing to prune"
    assert _call(capsysbinary, "prune", "empty", "--keep-best", "1")[0] == 1
    for name in ("closed", "a file", "loop", "nowhere"):
        _call(capsysbinary, "prune", name, "--keep-last", "1")
    status, out, _ = _call(capsysbinary, "purge", "zoo", "--yes")
    assert (status, out) == (0, f"{4 + len(readable)} runs are deleted for good\n")


def test_each_command_on_each_animal_is_done_or_says_why_not(animals, tmp_path, capsysbinary):
    for kind, path in animals.items():
        name = f"{path.parent.name}/{path.name}"
        for command in (
            ("tag", name, "ä 🎉"), ("untag", name, "night"), ("verify", name, "--deep"), ("pin", name), ("unpin", name),
            ("export", name, str(tmp_path / f"{kind}.pth")),
        ):  # fmt: skip
            _call(capsysbinary, *command)
        status, _, err = _call(capsysbinary, "rm", name)
        assert (status, path.exists()) == ((1, True) if kind in {"live", "future"} else (0, False)), (kind, err)
        status, _, err = _call(capsysbinary, "restore", name)
        assert (status, path.exists()) == (1 if kind in {"live", "future"} else 0, True), (kind, err)
    assert {path.name for path in tmp_path.glob("*.pth")} >= {
        "whole.pth",
        "super_gradients.pth",
        "live.pth",
    }
    assert not (tmp_path / "future.pth").exists()


def test_what_lies_between_the_runs_is_left_alone(animals, root, capsysbinary):
    for name in ("RUN_20260102_000000_000000", "RUN_20260102_000001_000000", "notes.txt"):
        status, out, err = _call(capsysbinary, "rm", str(root / "zoo" / name))
        assert (status, out) == (1, ""), err
        assert os.path.lexists(root / "zoo" / name)


@pytest.mark.needs("setpriv")
@pytest.mark.needs("root")
def test_what_this_user_may_not_read_stays_and_is_told(animals, root):
    def outside(*arguments):
        done = subprocess.run(
            ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", "runmgr.cli", *arguments],
            capture_output=True, env=clean_environment(PYTHONPATH=str(REPOSITORY)), timeout=60, text=True,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    status, out, err = outside("prune", "zoo", "--keep-last", "0", "--json")
    assert status == 0, err
    kept = {run["run_id"]: run["why"] for run in json.loads(out)["kept"]}
    for name in ("unreadable", "unreadable_record"):
        assert kept[animals[name].name] == "not made by runmgr, or its run.json cannot be read"
    status, out, err = outside("rm", f"zoo/{animals.unreadable.name}", f"zoo/{animals.whole.name}")
    assert (status, out.count("is in the trash"), err.count("Permission denied")) == (1, 1, 1), err
    assert list(directory.Experiment(root, "zoo").trash_path.iterdir()) != []
