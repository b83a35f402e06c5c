"""Twenty processes prune, remove, list and tag in one experiment, in which one trains: nothing live or protected is lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import time
import traceback

import pytest
import torch
from sizes import size

import runmgr
from runmgr import cli
from runmgr.disk import care, checkpoints, directory, pruning, record, trash, verification

SECONDS = size(5, 60)
CROWD = {"prune": 5, "rm": 4, "ls": 5, "tag": 5, "restore": 1}  # twenty


def _turns(until):
    """Yield until the time has come, but twice at least: the machine may be busy."""
    turn = 0
    while turn < 2 or time.monotonic() < until:
        yield turn
        turn += 1


def _run(root, **options):
    with runmgr.start_run("crowd", ckpt_root_dir=root, monitor="acc", **options) as run:
        state = {"net": torch.nn.Linear(2, 2)}
        run.restore(state)
        run.save(state, epoch=2 if "fork_from" in options else 1, metrics={"acc": 0.5})
    return run.run_id


def _train(root, _, told):
    """Be live until the last of the others has ended, and save again and again."""
    net = torch.nn.Linear(2, 2)
    with runmgr.start_run("crowd", ckpt_root_dir=root, monitor="acc", tags=["live"]) as run:
        (told / "live").write_text(run.run_id)
        epoch = 0
        while not (told / "stop").exists():
            epoch += 1
            run.save({"net": net}, epoch=epoch, metrics={"acc": epoch})
            time.sleep(0.05)
    return {"run_id": run.run_id, "epoch": epoch}


def _make(root, until, _told):
    """Add runs, so that there is always one to remove."""
    made = []
    for _ in _turns(until):
        made.append(_run(root))
        time.sleep(0.2)
    return made


def _ls(root, until, _told):
    counts = []
    for _ in _turns(until):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(["ls", "crowd", "--root", str(root), "--json", "-n", "1000"]) == 0
        counts.append(len(json.loads(out.getvalue())))
    return counts


def _prune(root, until, _told):
    done = 0
    for _ in _turns(until):
        pruned = pruning.plan_prune("crowd", keep_last=3, ckpt_root_dir=root).carry_out()
        assert not pruned.failed, [str(error) for _, error in pruned.failed]
        done += len(pruned.removed)
        time.sleep(0.05)
    return done


def _rm(root, until, told):
    """Remove anything but what is a parent, which only pruning spares: also the live run and the pinned one, in vain."""
    done = 0
    spared = {(told / "parent").read_text()}
    for _ in _turns(until):
        ids = [run.run_id for run in runmgr.list_runs("crowd", root) if run.run_id not in spared]
        with contextlib.suppress(runmgr.RunNotFound, runmgr.RunBusy, runmgr.RunProtected):
            care.remove_run(f"crowd/{random.choice(ids)}", ckpt_root_dir=root)
            done += 1
    return done


def _tag(root, until, _told):
    """Add tags, each only once; returns those that were reported as added."""
    added = []
    for _ in _turns(until):
        tag = f"tag-{os.getpid()}-{len(added)}"
        run = random.choice(runmgr.list_runs("crowd", root))
        with contextlib.suppress(runmgr.RunNotFound):
            if tag in care.tag_run(f"crowd/{run.run_id}", tag, ckpt_root_dir=root):
                added.append((run.run_id, tag))
        time.sleep(0.02)
    return added


def _restore(root, until, _told):
    done = 0
    for _ in _turns(until):
        lying = list(trash.trashed_ids(directory.Experiment(root, "crowd")))
        with contextlib.suppress(runmgr.RunNotFound):
            care.restore_run(f"crowd/{random.choice(lying or ['RUN_none'])}", ckpt_root_dir=root)
            done += 1
        time.sleep(0.3)
    return done


def _start(function, root, until, told):
    """Fork a process that leaves what the function returns, or the trace of what it raises."""
    pid = os.fork()
    if not pid:
        try:
            try:
                answer = {"value": function(root, until, told)}
            except BaseException:  # noqa: BLE001  # the parent judges
                answer = {"error": traceback.format_exc()}
            (told / f"{os.getpid()}.json").write_text(json.dumps(answer))
        finally:
            os._exit(0)
    return pid


def _value(pid, told):
    os.waitpid(pid, 0)
    answer = json.loads((told / f"{pid}.json").read_text())
    assert "error" not in answer, answer["error"]
    return answer["value"]


@pytest.mark.scales
def test_nothing_live_or_protected_is_lost_and_no_listing_fails_while_twenty_prune_remove_list_and_tag(root, tmp_path):
    told = tmp_path / "told"
    told.mkdir()

    def begin(*_):
        ids = [_run(root) for _ in range(6)]
        care.pin_checkpoint(f"crowd/{ids[0]}", ckpt_root_dir=root)
        return {"pinned": ids[0], "parent": ids[1], "child": _run(root, fork_from=ids[1])}

    first = _value(_start(begin, root, 0, told), told)
    care.pin_checkpoint(f"crowd/{first['child']}", ckpt_root_dir=root)  # it stays, so its parent does
    (told / "parent").write_text(first["parent"])
    until = time.monotonic() + SECONDS
    functions = {"prune": _prune, "rm": _rm, "ls": _ls, "tag": _tag, "restore": _restore}
    training, making = _start(_train, root, until, told), _start(_make, root, until, told)
    crowd = {name: [_start(functions[name], root, until, told) for _ in range(count)] for name, count in CROWD.items()}
    found = {name: [_value(pid, told) for pid in pids] for name, pids in crowd.items()}
    made = _value(making, told)
    (told / "stop").touch()
    trained = _value(training, told)
    print({name: sum(map(len, values)) if name in {"ls", "tag"} else sum(values) for name, values in found.items()})

    experiment = directory.Experiment(root, "crowd")
    here = {name: experiment.run(name) for name in os.listdir(experiment.path) if directory.is_run_id(name)}
    there = {name: directory.RunDirectory(experiment.trash_path / name) for name in trash.trashed_ids(experiment)}
    assert not here.keys() & there.keys()
    assert {first["pinned"], first["parent"], first["child"], trained["run_id"]} <= here.keys()
    assert here.keys() | there.keys() >= {*made, *first.values()}, "a run is nowhere"
    for name, run in (here | there).items():
        entries = checkpoints.listed(run)
        assert [problem for _, problem in verification.check(run, entries, lambda _: None) if problem] == [], name
        was_reported = name in {*made, *first.values(), trained["run_id"]}  # else removed before its first save
        assert entries or not was_reported, sorted(run.path.rglob("*"))
        statuses = {
            record.look_at_json(run.attempt_path(number)).get("status") for number in record.attempt_numbers(run)
        }
        assert record.REMOVING not in statuses, name
    live = runmgr.get_run("crowd", trained["run_id"], root)
    assert (live.status, live.latest["epoch"], live.attempt) == ("completed", trained["epoch"], 1)
    for name, tag in (pair for pairs in found["tag"] for pair in pairs):
        assert ((here | there)[name].tags_path / tag).exists(), (name, tag)
    assert made == sorted(made), "an id went back"
    assert sum(found["prune"]) + sum(found["rm"]) > 0
    assert sum(map(len, found["ls"])) > 0
