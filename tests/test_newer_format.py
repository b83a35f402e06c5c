"""A run in which a later version of runmgr wrote, in a way that this one would misread, is shown and left alone."""

from __future__ import annotations

import json

import pytest
import torch

import runmgr
from runmgr import cli
from runmgr.disk import record

NEWER = record.FORMAT + 1
WHY = rf"a newer runmgr wrote it \(format {NEWER}, this one knows {record.FORMAT}\); upgrade runmgr"


def trained():
    with runmgr.start_run("new", monitor="loss", mode="min", resume="never") as run:
        state = {"net": torch.nn.Linear(1, 1)}
        run.restore(state)
        run.save(state, epoch=1, metrics={"loss": 0.5})
    return run


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=["run.json", ".runmgr/attempts/0001.json"])
def newer(request):
    """A run with a file of the next format: its record, or one attempt's that was begun by the newer version."""
    run = trained()
    change(run.run_dir / request.param, format=NEWER, shards=[1])
    return run


CALLS = {
    "resume": lambda run: runmgr.start_run("new", resume="latest", monitor="loss", mode="min"),
    "run_id": lambda run: runmgr.start_run("new", run_id=run.run_id, monitor="loss", mode="min"),
    "fork": lambda run: runmgr.start_run("new", fork_from=run.run_id),
    "verify": lambda run: runmgr.verify_run(run.run_dir),
    "pin": lambda run: runmgr.pin_checkpoint(run.run_dir),
    "export": lambda run: runmgr.export_checkpoint(run.run_dir, run.run_dir.parents[1] / "copy.pth"),
    "average": lambda run: runmgr.average_checkpoints(run.run_dir, best=1),
    "remove": lambda run: runmgr.remove_run(run.run_dir),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_writes_or_judges_says_why_it_does_not(newer, call):
    before = content(newer.run_dir)
    with pytest.raises(runmgr.RunError, match=WHY):
        CALLS[call](newer)
    assert content(newer.run_dir) == before
    assert runmgr.list_experiments() == ["new"]
    assert len(runmgr.list_runs("new")) == 1


def test_looking_goes_on(newer, capsys):
    (run,) = runmgr.list_runs("new")
    assert (run.status, run.latest["epoch"], runmgr.best_run("new").run_id) == ("completed", 1, newer.run_id)
    assert cli.main(["show", "new", "--no-plot"]) == 0
    assert f"completed: a newer runmgr wrote it (format {NEWER}" in capsys.readouterr().out
    plan = runmgr.plan_prune("new", keep_last=0)
    assert (plan.going, "a newer runmgr" in plan.kept[0].why) == ((), True)


def test_new_fields_of_this_format_and_no_number_at_all_are_fine():
    run = trained()
    for path in (run.run_dir / "run.json", run.run_dir / ".runmgr/attempts/0001.json"):
        found = json.loads(path.read_text())
        del found["format"]
        path.write_text(json.dumps(found | {"galaxy": "Milky Way"}, indent=1))
    with runmgr.start_run("new", run_id=run.run_id, monitor="loss", mode="min") as again:
        assert again.restore({"net": torch.nn.Linear(1, 1)}).epoch == 1
    found = json.loads((run.run_dir / "run.json").read_text())
    assert (found["format"], found["galaxy"]) == (record.FORMAT, "Milky Way")
