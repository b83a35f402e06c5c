"""A resumed run says what differs from the attempt before, the most important first, and writes it down."""

from __future__ import annotations

import json
import os

import pytest
import torch

import runmgr
from runmgr import cli
from runmgr.disk import drift, provenance

NOW = {
    "config": {"lr": 0.1, "model": {"depth": 4, "sizes": [1, 2]}}, "python": "3.12.1", "torch": "2.7.0", "world_size": 4,
    "packages": {"numpy": "2.0", "torch": "2.7.0"}, "git": {"commit": "a" * 40, "dirty": False, "diff": ""},
    "hosts": [{"host": "a", "devices": ["H100", "H100"]}, {"host": "b", "devices": ["H100", "H100"]}],
}  # fmt: skip


def _start(resume="latest", **options):
    with runmgr.start_run("x", resume=resume, **options) as run:
        run.restore({"n": 0})
        run.save({"n": 1}, epoch=1)
    attempt = json.loads((run.run_dir / f".runmgr/attempts/{run.attempt:04d}.json").read_text())
    return run, attempt, max(run.run_dir.glob("log_*.txt")).read_text()


def test_nothing_is_said_where_nothing_differs(root, capsys):
    _start(config={"lr": 0.1})
    _, attempt, log = _start(config={"lr": 0.1})
    assert attempt["drift"] == {}
    assert "config" not in attempt
    assert "differs" not in log
    assert cli.main(["show", "x"]) == 0
    assert "changed" not in capsys.readouterr().out


def test_what_differs_is_logged_recorded_and_shown_with_secrets_masked(root, capsys, monkeypatch):
    _start(config={"lr": 0.1, "api_key": "one", "gone": 1})
    packages = provenance.packages()
    monkeypatch.setattr(provenance, "packages", lambda: packages | {"numpy": "99.0"})
    run, attempt, log = _start(config={"lr": 0.2, "api_key": "two", "url": "http://me:pw@host"})
    url = f"http://{provenance.MASK}@host"
    config = {"lr": [0.1, 0.2], "url": [None, url], "gone": [1, None]}
    assert attempt["drift"] == {"config": config, "packages": {"numpy": [packages["numpy"], "99.0"]}}
    assert attempt["config"] == {"lr": 0.2, "api_key": provenance.MASK, "url": url}
    assert json.loads((run.run_dir / "config.json").read_text())["lr"] == 0.1
    line = f"config: lr 0.1 → 0.2, url none → {url}, gone 1 → none; packages: numpy {packages['numpy']} → 99.0"
    assert f"this attempt differs from attempt 1: {line}\n" in log
    assert cli.main(["show", "x"]) == 0
    assert f"changed  {line}\n" in capsys.readouterr().out
    # the next is compared with attempt 2, not with the first
    _, attempt, log = _start(config={"lr": 0.3, "url": "http://me:pw@host"})
    assert attempt["drift"] == {"config": {"lr": [0.2, 0.3], "api_key": [provenance.MASK, None]}}
    _, attempt, log = _start(config={"lr": 0.3, "url": "http://me:pw@host"})
    assert attempt["drift"] == {}
    assert attempt["config"]["lr"] == 0.3
    assert attempt["packages"]["numpy"] == "99.0"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"world_size": 2, "torch": "2.8"}, "world size 2 → 4; torch 2.8 → 2.7.0"),
        ({"config": {"lr": 0.1, "model": {"depth": 3, "sizes": [1]}}}, "config: model.depth 3 → 4, model.sizes [1] → [1, 2]"),
        ({"hosts": [{"devices": ["A100"]}]}, "devices: H100 none → 4, A100 1 → none"),
        ({"git": {"commit": "b" * 40, "diff": "x"}}, f"git: commit {'b' * 40} → {'a' * 40}, uncommitted 2d711642b726 → none"),
        ({"packages": {f"p{i}": "1" for i in range(20)} | NOW["packages"]},
         "packages: " + ", ".join(f"p{i} 1 → none" for i in range(6)) + " and 14 more"),
        ({"config": {"lr": "x" * 100, "model": NOW["config"]["model"]}}, f"config: lr {'x' * 39}… → 0.1"),
        (dict.fromkeys(NOW), ""),
    ],
)  # fmt: skip
def test_one_line_says_it(change, line):
    assert drift.sentence(drift.between(NOW | change, NOW)) == line


def test_every_attempt_records_where_it_ran(root):
    _, attempt, _ = _start()
    (host,) = attempt["hosts"]
    assert (attempt["world_size"], attempt["torch"]) == (1, torch.__version__)
    assert (host["ranks"], host["devices"]) == ([0], provenance.devices())
    assert attempt["clock_offset_s"] == 0.0
    assert attempt["pids"] == {host["host"]: [os.getpid()]}
    assert {"python", "launch", "argv", "cwd", "user"} <= set(attempt)
