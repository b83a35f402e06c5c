"""Finding runs: references, filters, the best, and how little is opened for it."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest

import runmgr
from runmgr.disk import atomic, catalog, summary
from runmgr.disk.directory import RUN_ID_FORMAT
from runmgr.errors import InvalidInput, InvalidName, RunNotFound

HOUR = 3600.0


def make_run(root, name="digits", *, ago_s=0.0, acc=None, epoch=1, **record):
    """A run as runmgr leaves it, made some time ago."""
    run_id = (datetime.now(UTC) - timedelta(seconds=ago_s)).strftime(RUN_ID_FORMAT)
    run = root / name / run_id
    (run / ".runmgr").mkdir(parents=True)
    checkpoint = {"epoch": epoch, "step": 10 * epoch, "metrics": {} if acc is None else {"acc": acc}}
    known = {"status": "completed", "monitor": "acc", "mode": "max", "latest": checkpoint, "best": checkpoint} | record
    atomic.write_json(
        run / "run.json", dict.fromkeys(("format", *summary.FIELDS)) | known | {"run_id": run_id, "packages": {}}
    )
    (run / "ckpt_latest.pth").touch()
    return run


@pytest.fixture
def runs(root):
    """Three runs, oldest first; the middle one is best."""
    return [make_run(root, ago_s=ago_s, acc=acc) for ago_s, acc in ((72 * HOUR, 0.5), (2 * HOUR, 0.9), (0, 0.7))]


@pytest.mark.parametrize(
    ("reference", "which"),
    [
        ("digits", 2), ("digits/latest", 2), ("digits/", 2), ("digits/best", 1), ("digits@-1", 2), ("digits@-3", 0),
        ("digits@0", 0), ("digits@2", 2), ("digits/{0}", 0), ("{1}", 1), ("{root}/digits/{0}", 0), ("{root}/digits/{0}/", 0),
        ("{root}/digits/{0}/ckpt_latest.pth", 0), ("{root}/digits", 2), ("checkpoints/digits/{1}", 1),
        ("./checkpoints/digits", 2), ("checkpoints/digits", 2),
    ],
)  # fmt: skip
def test_a_run_is_meant_by_many_words(root, runs, tmp_path, monkeypatch, reference, which):
    monkeypatch.chdir(tmp_path)
    text = reference.format(*(run.name for run in runs), root=root)
    assert runmgr.find_run(text).path == runs[which]


def test_inside_a_run_a_dot_means_it_and_a_name_does_not(root, runs, monkeypatch):
    monkeypatch.chdir(runs[0] / ".runmgr")
    assert runmgr.find_run(".").path == runmgr.find_run("../ckpt_latest.pth").path == runs[0]
    assert runmgr.find_run("digits").path == runmgr.find_run("digits/latest").path == runs[2]


def test_an_experiment_may_be_called_like_a_count(root, runs):
    odd = make_run(root, "digits@-2")
    assert runmgr.find_run("digits@-2").path == odd


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("digit", "did you mean digits?"),
        ("digits@-4", "has no run @-4; it has 3: @-1 is the newest, @-3 the first"),
        ("digits@3", "has no run @3"),
        ("digits/RUN_2026", "there is no run 'RUN_2026'"),
        ("RUN_2026", "no experiment in"),
        ("./nowhere", "there is no experiment 'nowhere'"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(runs, reference, message):
    with pytest.raises(RunNotFound, match=message.replace("?", r"\?")):
        runmgr.find_run(reference)


def test_an_id_that_is_nowhere_is_told_the_like_with_their_experiments(runs):
    almost = runs[1].name[:-1] + "x"
    with pytest.raises(RunNotFound, match=f"did you mean digits/{runs[1].name}"):
        runmgr.find_run(almost)


@pytest.mark.parametrize("reference", ["", "a\nb", "a\0b", "digits/a\0b"])
def test_a_reference_that_can_be_no_name_is_refused(runs, reference):
    with pytest.raises((InvalidName, RunNotFound)):
        runmgr.find_run(reference)


def test_runs_are_filtered_by_status_tag_metric_and_age(root, runs):
    failed = make_run(root, ago_s=60, acc=0.8, epoch=7, status="failed", tags=["night", "big"])
    lost = make_run(root, ago_s=90, acc=None, status="running", tags=["night"])

    def found(**options):
        return [run.path for run in runmgr.list_runs("digits", **options)]

    assert found() == [runs[2], failed, lost, runs[1], runs[0]]
    assert found(status="failed") == [failed]
    assert found(status=["failed", "lost"]) == [failed, lost]
    assert found(tags="night") == [failed, lost]
    assert found(tags=["night", "big"]) == [failed]
    assert found(where="acc>=0.8") == [failed, runs[1]]
    assert found(where=["acc >= 0.8", "epoch<7"]) == [runs[1]]
    assert found(where="step = 70") == [failed]
    assert found(where="acc!=0.7", limit=2) == [failed, runs[1]]
    assert found(where="nothing>0") == []
    assert found(newer_than_s=HOUR) == [runs[2], failed, lost]
    assert found(older_than_s=HOUR) == [runs[1], runs[0]]
    assert found(older_than_s=HOUR, newer_than_s=3 * HOUR) == [runs[1]]


@pytest.mark.parametrize("where", ["acc", "acc>", ">0.5", "acc>high", "acc>0.5>0.4"])
def test_a_condition_that_is_none_is_refused(runs, where):
    with pytest.raises(InvalidInput, match=r"such as 'val/accuracy>0\.9'"):
        runmgr.list_runs("digits", where=where)
    with pytest.raises(InvalidInput, match="there is no status"):
        runmgr.list_runs("digits", status="lsot")


def test_the_best_is_by_the_metric_and_mode_of_the_newest_run_unless_told(root, runs):
    assert runmgr.best_run("digits").path == runs[1]
    assert runmgr.best_run("digits", mode="min").path == runs[0]
    newest = make_run(root, acc=0.6, monitor="loss", mode="min", best={"metrics": {"loss": 0.1, "acc": 0.6}})
    assert runmgr.best_run("digits").path == newest
    assert runmgr.best_run("digits", "acc").path == runs[1], "as the newest run that monitors acc says"
    with pytest.raises(
        RunNotFound, match=r"no run of .* has saved a checkpoint with the metric 'acx'; did you mean acc\?"
    ):
        runmgr.best_run("digits", "acx")


def test_ties_keep_the_older_and_what_is_not_finite_never_wins(root, runs):
    make_run(root, acc=0.9)
    make_run(root, best={"metrics": {"acc": "inf"}}, latest={"metrics": {"acc": "nan"}})
    assert runmgr.best_run("digits").path == runs[1]


def test_listing_opens_only_what_is_shown(root, monkeypatch):
    for number in range(50):
        make_run(root, ago_s=100 - number, acc=0.5)
    opened = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: (opened.append(str(path)), real(path, *rest, **more))[1]
    )
    assert len(runmgr.list_runs("digits", limit=20)) == 20
    assert len(opened) == 20
    opened.clear()
    runmgr.best_run("digits", "acc", mode="max")
    assert len(opened) == 51, "each record once, and the winner's for the answer"


def test_where_reads_wait_many_are_read_at_once_in_the_same_order(root, monkeypatch):
    for number in range(200):
        make_run(root, ago_s=1000 - number, acc=number / 1000)
    expected = [run.path for run in runmgr.list_runs("digits")]
    real, reading, most = summary.read, [], []

    def slow(path):
        reading.append(path)
        most.append(len(reading))
        time.sleep(0.01)
        reading.remove(path)
        return real(path)

    monkeypatch.setattr(summary, "read", slow)
    heard, ids = [], [path.name for path in expected]
    found = list(catalog.look(catalog.find_experiment("digits", root), ids, lambda *done: heard.append(done)))
    assert [run.path for run in found] == expected
    assert max(most[:64]) == 1, "until it is clear that reads wait"
    assert max(most) >= 10
    assert heard[-1] == (200, 200)


def test_a_record_tells_the_same_whether_its_summary_stands_in_front_or_not(root, tmp_path):
    run = make_run(root, acc=0.5, tags=["a"], parent={"path": "x"})
    content = json.loads((run / "run.json").read_text())
    expected = runmgr.find_run(run)
    for other in (
        json.dumps(content),
        json.dumps(dict(reversed(content.items())), indent=1),
        json.dumps(content, indent=4),
        json.dumps({"format": 1, "note": {"run_id": ',\n "run_id"'}} | content, indent=1),
    ):
        (run / "run.json").write_text(other)
        assert runmgr.find_run(run) == expected


def test_a_training_writes_the_summary_in_front(root):
    with runmgr.start_run("digits", monitor="acc") as run:
        run.save({"x": 1}, epoch=1, metrics={"acc": 0.5})
    content = summary.read(f"{run.run_dir}/run.json")
    assert "packages" not in content
    assert content["status"] == "completed"
    assert content["best"]["metrics"] == {"acc": 0.5}
