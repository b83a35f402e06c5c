"""Every reading command against a zoo of damaged, foreign, live and lost runs: no traceback, and the rest is shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import REPOSITORY, clean_environment
from sizes import size

from runmgr import cli
from runmgr.disk import summary

LISTED = {
    "whole": "completed", "failed": "failed", "truncated": "unreadable", "foreign": "unreadable", "wrong_types": "unknown",
    "future": "hibernating", "record_is_a_directory": "unreadable", "record_loops": "unreadable", "long": "completed",
    "unicode": "completed", "escapes": "completed", "lost": "lost", "live": "running",
}  # fmt: skip


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    with zoo.opened(tmp_path_factory.mktemp("roots") / "checkpoints") as animals:
        yield animals


@pytest.fixture
def call(animals, capsysbinary):
    def call(*arguments):
        status = cli.main([*arguments, "--root", str(animals.whole.parent.parent)])
        out, err = (text.decode(errors="replace") for text in capsysbinary.readouterr())
        assert "Traceback" not in err
        return status, out, err

    return call


@pytest.fixture
def outside(animals):
    """Runs a command in a process of its own, where root may not read everything, with another command around it."""

    def outside(*arguments, around=("setpriv", "--bounding-set=-dac_override,-dac_read_search")):
        done = subprocess.run(
            [*around, sys.executable, "-m", "runmgr.cli", *arguments, "--root", str(animals.whole.parent.parent)],
            capture_output=True, env=clean_environment(PYTHONPATH=str(REPOSITORY)), timeout=60,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    return outside


def _statuses(out):
    return {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}


def test_ls_shows_every_run_whatever_is_the_matter_with_others(animals, call):
    status, out, _ = call("ls", "zoo", "-n", "50")
    found = _statuses(out)
    assert status == 0
    assert {name: found.get(animals[name].name) for name in LISTED} == LISTED
    assert found["RUN_yesterday"] == "unknown"
    assert found["RUN_20260102_000000_000000"] == "unreadable", "a loop of links"
    assert "\x1b" not in out
    _, out, _ = call("ls", "zoo", "--all", "--json")
    assert {run["run_id"] for run in json.loads(out)} == set(found)


def test_ls_lists_all_experiments_that_can_be_named(animals, call):
    status, out, _ = call("ls")
    assert status == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "EXPERIMENT",
        "closed",
        "coco",
        "empty",
        "wörter 🎉",
        "zoo",
    ]
    status, out, _ = call("ls", "--status", "completed", "-n", "100")
    assert (status, out.count(animals.whole.name)) == (0, 2), "one in each of two experiments"


def test_what_root_may_not_read_either_is_named_and_the_rest_is_shown(animals, outside):
    status, out, _ = outside("ls", "zoo", "-n", "50")
    assert status == 0
    expected = LISTED | {"unreadable": "unreadable", "unreadable_record": "unreadable"}
    found = _statuses(out)
    assert {name: found.get(animals[name].name) for name in expected} == expected
    status, out, err = outside("ls")
    assert (status, "zoo" in out, "closed" in err) == (0, True, True)
    status, out, err = outside("ls", "--tag", "night")
    assert (status, animals.whole.name in out, "closed" in err) == (0, True, True)
    for command in ("show", "path", "logs"):
        for name in ("unreadable", "unreadable_record"):
            status, _, err = outside(command, f"zoo/{animals[name].name}")
            assert status in {0, 1}
            assert err.count("\n") <= 1
    status, _, err = outside("ls", "closed")
    assert (status, "Permission denied" in err) == (1, True)


@pytest.mark.needs("root")
def test_reading_commands_need_to_write_nothing(animals, outside):
    root = animals.whole.parent.parent
    script = f'mount --bind "{root}" "{root}" && mount -o remount,ro,bind "{root}" && exec "$@"'
    around = ("unshare", "--mount", "sh", "-c", script, "sh")
    for arguments in (
        ["ls"],
        ["ls", "zoo"],
        ["latest", "zoo"],
        ["best", "zoo"],
        ["show", "zoo/best"],
        ["logs", "zoo"],
    ):
        status, out, err = outside(*arguments, around=around)
        assert (status, bool(out), err) == (0, True, "")


NAMES = [*LISTED, "super_gradients", "unfinished", "unreadable", "unreadable_record"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["plain", "json"])
def test_every_run_can_be_looked_at(animals, call, name, flags):
    run = animals[name]
    reference = f"{run.parent.name}/{run.name}"
    for command in (
        ["show", reference],
        ["path", reference],
        ["compare", reference, "zoo/best"],
        ["compare", "zoo/best", reference, "--all"],
    ):
        status, out, err = call(*command, *flags)
        assert (status, err) == (0, "")
        assert run.name in out
        assert "\x1b" not in out
        if flags:
            assert json.loads(out)
    status, out, err = call("logs", reference, *flags)
    assert status == 0 or "has no log" in err


def test_latest_and_best_go_past_what_they_cannot_use(animals, call):
    assert call("latest", "zoo")[:2] == (0, f"{animals.whole.name}\n")
    assert call("best", "zoo", "--metric", "acc")[0] == 0
    assert call("best", "zoo", "--metric", "Genauigkeit ü")[:2] == (0, f"{animals.unicode.name}\n")
    assert call("latest", "coco")[:2] == (0, f"{animals.super_gradients.name}\n")
    for arguments in (["best", "coco"], ["latest", "empty"], ["best", "empty"], ["show", "loop"], ["ls", "a file"]):
        status, out, err = call(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)


def test_curves_of_a_damaged_file_go_as_far_as_it_can_be_read(animals, call):
    status, out, _ = call("show", f"zoo/{animals.escapes.name}", "--plot", "acc")
    assert status == 0
    assert "acc: min 0.25 at step 10" in out


@pytest.mark.parametrize("command", ["ls", "show", "best", "latest", "path"])
def test_without_a_root_or_in_an_empty_one_it_is_said(command, tmp_path, capsys):
    for root in (tmp_path / "missing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        arguments = [command, "x", "--root", str(root)]
        assert cli.main(arguments) == 1
        assert "there is no experiment 'x' in" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists(), "looking creates nothing"


def test_a_run_that_is_deleted_while_runs_are_listed_is_left_out(animals, tmp_path, capsys, monkeypatch):
    root = tmp_path / "checkpoints"
    for number in range(5):
        shutil.copytree(animals.whole, root / "zoo" / f"RUN_20260101_{number:06d}_000000")
    read, deleted = summary.read, []

    def reading(path):
        if not deleted:
            shutil.rmtree(root / "zoo" / "RUN_20260101_000002_000000")
            deleted.append(path)
        return read(path)

    monkeypatch.setattr(summary, "read", reading)
    assert cli.main(["ls", "zoo", "--root", str(root)]) == 0
    assert list(_statuses(capsys.readouterr().out)) == [f"RUN_20260101_00000{number}_000000" for number in (4, 3, 1, 0)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
CHECKPOINT = st.dictionaries(st.sampled_from(["epoch", "step", "metrics", "attempt"]), JSON | st.just({"acc": 0.5}))
FIELDS = st.dictionaries(
    st.sampled_from([
        *summary.FIELDS, "hosts", "git", "error", "argv", "packages", "first_failure", "run_id", "format", "python", "config",
    ]),
    JSON | CHECKPOINT,
)  # fmt: skip
CONTENTS = (
    FIELDS.map(lambda value: json.dumps(value).encode(errors="surrogatepass"))
    | FIELDS.map(lambda value: json.dumps(value, indent=1, ensure_ascii=False).encode(errors="surrogatepass"))
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=100)
)


@pytest.fixture(scope="module")
def fuzzed(animals, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(animals.whole, root / "x" / "RUN_20260101_000000_000000")
    shutil.copytree(animals.whole, root / "x" / "RUN_20260101_000001_000000")
    return root


@pytest.mark.scales
@settings(
    max_examples=size(15, 300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=CONTENTS, config=CONTENTS, attempt=CONTENTS)
def test_whatever_the_records_hold_the_commands_show_it_and_the_other_run(fuzzed, capsys, content, config, attempt):
    bad, good = (f"RUN_20260101_00000{number}_000000" for number in (0, 1))
    for name, written in (("run.json", content), ("config.json", config), (".runmgr/attempts/0001.json", attempt)):
        path = fuzzed / "x" / bad / name
        path.unlink(missing_ok=True)
        path.write_bytes(written)
    for flags in ([], ["--json"]):
        for arguments in (
            ["ls", "x"],
            ["ls", "x", "--where", "acc>=0.5"],
            ["best", "x", "--metric", "acc"],
            ["compare", "x@0", "x@1"],
        ):
            assert cli.main([*arguments, *flags, "--root", str(fuzzed)]) == 0
            assert good in capsys.readouterr().out
        assert cli.main(["show", "x@0", *flags, "--root", str(fuzzed)]) == 0
        out = capsys.readouterr().out
        assert bad in out
        if flags:
            json.loads(out)


def test_the_zoo_stays_as_it_was(animals, call):
    """Looking changes nothing: no file is written, made or removed."""

    def everything():
        return sorted(
            (entry.path, entry.stat(follow_symlinks=False).st_mtime_ns) for entry in _walk(animals.whole.parent)
        )

    before = everything()
    for command in (
        "ls zoo",
        "show zoo/best",
        "logs zoo",
        "best zoo",
        "latest zoo",
        "path zoo best",
        "compare zoo@0 zoo@1",
    ):
        call(*command.split())
    assert everything() == before


def _walk(path):
    for entry in os.scandir(path):
        if entry.name != "lease":
            yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
