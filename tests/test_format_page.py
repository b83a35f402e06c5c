"""docs/format.md names the files and fields that a run leaves, with their types, and no others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from processes import REPOSITORY, run_ranks

sys.path.append(str(Path(__file__).resolve().parent / "disk"))

from shelves import damage

import runmgr
from runmgr.disk import provenance
from runmgr.worker import writing

PAGE = (REPOSITORY / "docs/format.md").read_text()
TABLE = re.compile(r"^\| field \| type \| \|\n\|(?:---\|)+\n((?:\|.*\n)+)", flags=re.MULTILINE)
PRIVATE = {"lease", "token"}


def tables() -> dict[str, dict[str, str]]:
    """Return the page's tables of fields: what they are about → field → type."""
    found = {}
    for table in TABLE.finditer(PAGE):
        before = PAGE[: table.start()].strip().splitlines()
        named = re.match(r"`([\w.]+)`", before[-1])
        about = named[1] if named else [line for line in before if line.startswith("## ")][-1].removeprefix("## ")
        rows = [row.strip("| ").split(" | ") for row in table[1].splitlines()]
        found[about] = {field: row[1].rstrip("| ") for row in rows for field in re.findall(r"`(\w+)`", row[0])}
    return found


def fits(value, types: str) -> bool:
    return any(_is_a(value, kind) for kind in types.removesuffix(", sometimes").split(" or "))


def _is_a(value, kind: str) -> bool:
    if kind.startswith("list of "):
        return isinstance(value, list) and all(_is_a(item, kind.removeprefix("list of ").rstrip("s")) for item in value)
    if kind == "time":
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo == UTC
    if isinstance(value, bool):
        return kind == "boolean"
    classes = {
        "text": str, "null": type(None), "whole number": int, "number": (int, float), "object": dict,
    }  # fmt: skip
    return isinstance(value, classes[kind])


def start(root, **options):
    keep = runmgr.Keep(last=2)
    return runmgr.start_run("everything", ckpt_root_dir=root, monitor="loss", mode="min", keep=keep, **options)


def parts():
    model = torch.nn.Linear(2, 1)
    return {"net": model, "average": runmgr.BestAverage(model, k=2, mode="min")}


def train(run, state, epochs):
    for epoch in epochs:
        state["average"].update(1 / epoch)
        run.log_scalars({"loss": 1 / epoch}, step=epoch)
        run.save(state, epoch=epoch, step=epoch, metrics={"loss": 1 / epoch})


def lose_a_rank(rank, root):
    with start(root, resume="never") as run:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not list(run.run_dir.glob(".runmgr/failures/*")) and time.monotonic() < deadline:
            time.sleep(0.01)


def fail(run, state):
    run.restore(state)
    raise ValueError("boom")


def repository(folder: Path) -> Path:
    folder.mkdir()
    (folder / "train.py").touch()
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    (folder / "train.py").write_text("changed\n")
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    return folder


def leave_all_there_is(root, patch) -> None:
    """Make runs that completed, failed, lost a rank, a save, a checkpoint and a record; a fork; every kind of average."""
    run_ranks(2, lose_a_rank, root)
    real, place = provenance.git, repository(root.parent / "code")
    patch.setattr(provenance, "git", lambda _: real(place))
    state = parts()
    with start(root, config={"lr": 0.1, "api_key": "secret"}, tags=["a", "b"], resume="never") as run:
        run.restore(state)
        train(run, state, range(1, 5))
        run.save_average(state["average"])
    state = parts()
    with start(root, fork_from=run.run_id) as fork:
        fork.restore(state)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "2"], cwd=place, check=True)
    patch.setattr(provenance, "packages", lambda: {"numpy": "0"})
    state = parts()
    with pytest.raises(ValueError, match="boom"), start(root, run_id=run.run_id) as again:
        fail(again, state)
    damage(run.run_dir / ".runmgr/checkpoints/0001-000004.pth", position=1000)  # which torch.load passes over
    state = parts()
    with start(root, run_id=run.run_id) as again:
        again.restore(state)
    (run.run_dir / ".runmgr/attempts/0001.json").unlink()
    state = parts()
    with start(root, run_id=run.run_id) as again:
        again.restore(state)
        train(again, state, range(5, 8))
    runmgr.pin_checkpoint(run.run_dir)
    runmgr.tag_run(run.run_dir, "later")
    for make in (runmgr.RunningAverage, runmgr.ExponentialAverage):
        with start(root, resume="never", capture_console=True) as short:
            average = make(torch.nn.Linear(1, 1))
            average.update()
            short.save_average(average)
            os.write(1, b"something")
    with start(root, resume="never", on_save_error="warn") as short:
        state = parts()
        train(short, state, range(1, 3))
        patch.setattr(writing, "write_file", lambda *_: os.open("/nowhere/at/all", os.O_WRONLY))
        short.save(state, epoch=3)
    runmgr.average_checkpoints(short.run_dir, best=2)


def objects_in(root) -> dict[str, list]:
    """Return what the page's tables are about, as it lies there."""
    found = defaultdict(list)
    for run in (root / "everything").glob("RUN_*"):
        found["run.json"].append(record := json.loads((run / "run.json").read_text()))
        found["manifest.json"] += [json.loads(path.read_text()) for path in run.glob(".runmgr/manifest.json")]
        found["An attempt"] += [json.loads(path.read_text()) for path in run.glob(".runmgr/attempts/*")]
        found["A failure"] += [json.loads(path.read_text()) for path in run.glob(".runmgr/failures/*")]
        for path in run.glob("ckpt_*.pth"):
            content = torch.load(path, weights_only=True)
            found["A checkpoint"].append({name: content[name] for name in content if name not in {"net", "average"}})
        found["average_model.pth"] += [torch.load(path, weights_only=True) for path in run.glob("average_model.pth")]
        found["latest"] += [record["latest"], record["best"]]
        for name in ("parent", "git", "save_error", "first_failure"):
            found[name].append(record.get(name))
        found["hosts"] += record["hosts"]
    found["members"] = [member for average in found["average_model.pth"] for member in average["members"]]
    listed = found["An attempt"] + found["manifest.json"]
    found["checkpoints"] = [one for some in listed for one in some["checkpoints"] + some.get("dropped", [])]
    found["error"] = [one.get("error") for one in found["run.json"] + found["An attempt"] + found["A failure"]]
    return {about: [one for one in some if one is not None] for about, some in found.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("format") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        leave_all_there_is(root, patch)
    return root


@pytest.mark.parametrize("about", tables())
def test_the_fields_on_the_page_are_those_in_the_files(root, about):
    fields, found = tables()[about], objects_in(root)[about]
    assert {name for one in found for name in one} == set(fields)
    always = {name for name, types in fields.items() if "sometimes" not in types}
    for one in found:
        assert always <= set(one) or "rebuilt" in one
        assert {name: value for name, value in one.items() if not fits(value, fields[name])} == {}


def test_every_kind_of_object_has_a_table(root):
    assert set(objects_in(root)) == set(tables())


def test_the_files_on_the_page_are_those_that_lie_there(root):
    table = PAGE[PAGE.index("## Files") : PAGE.index("A name that contains")]
    names = [
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall("`([^`]+)`", row.split(" | ")[0])
    ]
    words = {"<time>": r"\d{8}_\d{6}_\d{6}", "<object>": r"\d{4}-\d{6}\.pth", "<tag>": r"\w+"}
    patterns = {
        name: re.sub(r"(?<![\\\d{])\d+(?![}\d])", r"\\d+", re.escape(name)).replace(r"\*", ".*") for name in names
    }
    for word, pattern in words.items():
        patterns = {name: known.replace(re.escape(word), pattern) for name, known in patterns.items()}
    runs = list((root / "everything").glob("RUN_*"))
    files = [str(path.relative_to(run)) for run in runs for path in run.rglob("*") if path.is_file()]
    assert [file for file in files if not any(re.fullmatch(known, file) for known in patterns.values())] == []
    unseen = {name for name, known in patterns.items() if not any(re.fullmatch(known, file) for file in files)}
    assert unseen == {"ckpt_step_2000.pth", ".runmgr/lease", "log_<time>_rank3.txt", "console_<time>_rank3.txt"}
