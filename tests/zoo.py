"""Experiments as they lie about after years: whole runs beside damaged, foreign, live and lost ones.

    with zoo.opened(root) as animals: ...     # animals.whole is a run directory, animals["future"] another

Every animal is a run of the experiment "zoo", unless its name says where else it lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "disk"))

import holders
import torch
from processes import kill

import runmgr
from runmgr.disk import atomic, record
from runmgr.disk.directory import RunDirectory

EPOCHS = 10_000
ESCAPE = "\x1b[2Jcleared\n"


class Zoo(dict[str, Path]):
    """Run directories by what is the matter with them."""

    def __getattr__(self, name: str) -> Path:
        return self[name]


@contextlib.contextmanager
def opened(root: Path):
    """Build the zoo under `root`; a process that trains in the live run is killed at the end."""
    animals = Zoo(whole=_trained(root), failed=_failed(root), **_of_super_gradients(root))
    kinds = (
        "truncated", "foreign", "wrong_types", "future", "unreadable_record", "record_is_a_directory", "record_loops",
        "unreadable", "long", "unicode", "escapes", "lost", "live",
    )  # fmt: skip
    for number, kind in enumerate(kinds):
        animals[kind] = root / "zoo" / f"RUN_20260101_{number:06d}_000000"
        shutil.copytree(animals.whole, animals[kind])
        _change_record(animals[kind], run_id=animals[kind].name)
    _damage(animals)
    _strange_neighbours(root, animals)
    pid = holders.hold(RunDirectory(animals.live))
    try:
        yield animals
    finally:
        kill([pid])
        os.waitpid(pid, 0)
        with contextlib.suppress(FileNotFoundError):  # removed by a test
            animals.unreadable.chmod(0o755)
        (root / "closed").chmod(0o755)


def _trained(root: Path) -> Path:
    with runmgr.start_run(
        "zoo", ckpt_root_dir=root, config={"lr": 0.1, "model": {"depth": 3}}, monitor="acc", tags=["night"]
    ) as run:
        for epoch in range(1, 4):
            run.log_scalars({"acc": epoch / 4, "train/loss": 1 / epoch}, step=10 * epoch)
            run.save({"net": torch.nn.Linear(1, 1)}, epoch=epoch, step=10 * epoch, metrics={"acc": epoch / 4})
    return run.run_dir


def _failed(root: Path) -> Path:
    with contextlib.suppress(ZeroDivisionError), runmgr.start_run("zoo", ckpt_root_dir=root, monitor="acc") as run:
        raise ZeroDivisionError("nothing to divide")
    return run.run_dir


def _of_super_gradients(root: Path) -> dict[str, Path]:
    """Runs that another program made: no record, an id in local time, and one without any checkpoint."""
    found = {
        "super_gradients": root / "coco" / "RUN_20240501_101112_131415",
        "unfinished": root / "coco" / "RUN_20240502_101112_131415",
    }
    for path in found.values():
        path.mkdir(parents=True)
        (path / "console_May01_10_11_12.txt").write_text("The console\n")
    for name in ("ckpt_latest.pth", "ckpt_best.pth", "average_model.pth"):
        torch.save({"net": {}}, found["super_gradients"] / name)
    return found


def _change_record(run: Path, **changes) -> None:
    path = run / "run.json"
    atomic.write_json(path, json.loads(path.read_text()) | changes)


def _damage(animals: Zoo) -> None:
    (animals.truncated / "run.json").write_bytes((animals.whole / "run.json").read_bytes()[:200])
    (animals.foreign / "run.json").write_text('["another", "program\'s", "list"]')
    _change_record(
        animals.wrong_types, status=7, created=1, tags="night", attempt="one", monitor=["acc"], latest=5, parent="x", hosts=3,
        best={"metrics": [1, 2], "epoch": {}}, git=["x"], error="boom", argv={}, packages=[], first_failure=3, world_size=[],
    )  # fmt: skip
    _change_record(
        animals.future, format=99, status="hibernating", latest={"epoch": 3, "metrics": {"acc": {"mean": 0.5}}, "shards": [1]},
        galaxy={"arm": "Orion"},
    )  # fmt: skip
    (animals.unreadable_record / "run.json").chmod(0)
    (animals.record_is_a_directory / "run.json").unlink()
    (animals.record_is_a_directory / "run.json").mkdir()
    (animals.record_loops / "run.json").unlink()
    (animals.record_loops / "run.json").symlink_to("run.json")
    animals.unreadable.chmod(0)
    attempt = json.loads((animals.long / ".runmgr/attempts/0001.json").read_text())
    (last,) = attempt["checkpoints"][-1:]
    attempt["checkpoints"] = [last | {"sequence": number, "epoch": number, "names": []} for number in range(1, EPOCHS)]
    attempt["checkpoints"].append(last | {"sequence": EPOCHS, "epoch": EPOCHS})
    atomic.write_json(animals.long / ".runmgr/attempts/0001.json", attempt)
    atomic.write_json(animals.long / ".runmgr/manifest.json", attempt)
    _change_record(
        animals.unicode, tags=["näht 🎉", "夜"], monitor="Genauigkeit ü", best={"metrics": {"Genauigkeit ü": 0.5}}
    )
    _change_record(animals.escapes, tags=[ESCAPE], error={"type": "E", "message": ESCAPE}, argv=["train.py", ESCAPE])
    (animals.escapes / "log_20260101_000000_000000.txt").write_bytes(b"no \xff utf-8\n")
    events = next(animals.escapes.glob("events.*"))
    events.write_bytes(events.read_bytes()[:-7] + b"\xff" * 50)
    for name in ("lost", "live"):
        _change_record(animals[name], status="running", ended=None)


def _strange_neighbours(root: Path, animals: Zoo) -> None:
    """What lies between the runs, and what is no experiment."""
    zoo = root / "zoo"
    (zoo / "RUN_20260102_000000_000000").symlink_to("RUN_20260102_000000_000000")
    (zoo / "RUN_20260102_000001_000000").write_text("a file")
    (zoo / "RUN_yesterday").mkdir()
    (zoo / "notes.txt").write_text("remember")
    (root / "loop").symlink_to("loop")
    (root / "a file").write_text("")
    (root / "empty").mkdir()
    os.mkdir(os.fsencode(root) + b"/not utf-8 \xff")
    (root / "wörter 🎉").mkdir()
    shutil.copytree(animals.whole, root / "wörter 🎉" / animals.whole.name)
    (root / "closed").mkdir()
    (root / "closed").chmod(0)


def record_of(run: Path) -> dict:
    """What run.json holds."""
    return record.look_at_json(run / "run.json")
