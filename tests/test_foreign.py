"""Checkpoints that other programs saved, as the beginning of a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import runmgr
from runmgr.errors import CheckpointCorrupt, InvalidInput


def test_a_run_that_began_at_a_foreign_file_keeps_it_whatever_happens_to_the_file(tmp_path):
    theirs, weights = tmp_path / "theirs.pth", nn.Linear(2, 2).state_dict()
    torch.save({"net": weights}, theirs)
    model = nn.Linear(2, 2)
    with runmgr.start_run("x", fork_from=theirs) as run:
        torch.save({"net": nn.Linear(2, 2).state_dict()}, theirs)  # in place
        run.restore({"net": model})
    assert torch.equal(model.weight, weights["weight"])
    assert not run.path("latest").stat().st_mode & 0o222


def test_what_a_foreign_file_calls_as_runmgr_does_counts_if_it_means_the_same(tmp_path):
    odd = {"step": torch.tensor(5), "metrics": 0.5, "run_id": 3, "rng": torch.get_rng_state()}
    torch.save({"net": nn.Linear(2, 2).state_dict(), "epoch": 7} | odd, tmp_path / "theirs.pth")
    with runmgr.start_run("x", fork_from=tmp_path / "theirs.pth") as run:
        progress = run.restore({"net": nn.Linear(2, 2)})
    assert (progress.epoch, progress.step, progress.metrics) == (7, 0, {})


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (nn.Linear(2, 2).state_dict(), InvalidInput, "bare state dict, 'weight'.*load_state_dict"),
        ({"model": {}, "epoch": 3}, InvalidInput, r"has no \['net'\]; it holds \['model'\]"),
        (torch.ones(2), CheckpointCorrupt, "holds a Tensor, not a dict"),
        (nn.Linear(2, 2), CheckpointCorrupt, "weights_only"),
    ],
    ids=["bare", "other keys", "tensor", "pickled model"],
)
def test_what_a_foreign_file_holds_instead_is_said(tmp_path, content, error, says):
    torch.save(content, tmp_path / "theirs.pth")
    with runmgr.start_run("x", fork_from=tmp_path / "theirs.pth") as run, pytest.raises(error, match=says):
        run.restore({"net": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    "save",
    [lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), lambda path: path.write_text("hello")],
    ids=["old format", "text"],
)
def test_a_file_that_is_no_zip_makes_no_run(root, tmp_path, save):
    save(tmp_path / "old.pth")
    with pytest.raises(InvalidInput, match=r"old\.pth' is no zip file"):
        runmgr.start_run("x", fork_from=tmp_path / "old.pth")
    assert list(root.glob("x/RUN_*")) == []


def test_bare_weights_begin_a_run_that_is_fresh(root, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    model = nn.Linear(2, 2)
    with runmgr.start_run("x") as run:
        if run.restore({"net": model}).checkpoint is None:
            model.load_state_dict(run.load(tmp_path / "weights.pth"))
        run.save({"net": model}, epoch=1)
    assert torch.equal(run.load("latest")["net"]["weight"], torch.load(tmp_path / "weights.pth")["weight"])
