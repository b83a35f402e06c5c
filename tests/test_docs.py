"""What the documents say is executed, and what they show is what comes out."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from processes import REPOSITORY, clean_environment

from runmgr import cli

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "benchmarks/README.md"])
README = (REPOSITORY / "README.md").read_text()
VARIABLE = ((r"\d{8}_\d{6}_\d{6}", "T"), (r"tfevents\S*", "tfevents"), (r"\d\.\d+e?-?\d*", "N"))


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _same(text: str) -> str:
    for pattern, word in VARIABLE:
        text = re.sub(pattern, word, text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The README's first example, run by its own commands in an empty project."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "pyproject.toml").touch()
    (folder / "train.py").write_text(_blocks(README, "python")[0])
    bin_ = folder / "bin"
    bin_.mkdir()
    for name, options in (("torchrun", "-m torch.distributed.run"), ("runmgr", "-m runmgr.cli"), ("python", "")):
        (bin_ / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        (bin_ / name).chmod(0o755)
    environ = clean_environment()
    environ.pop("RUNMGR_CKPT_ROOT_DIR", None)
    environ["PATH"] = f"{bin_}:{environ['PATH']}"
    return folder, environ


def test_the_readme_shows_what_its_example_prints(trained):
    folder, environ = trained
    (session,) = _blocks(README, "console")
    shown, real = _replay(session, folder, environ, "sums")
    assert _same(real) == _same(shown)


def test_the_page_on_logs_shows_what_its_example_leaves(trained):
    folder, environ = trained
    page = (REPOSITORY / "docs/logs.md").read_text()
    (script,), (session,) = _blocks(page, "python"), _blocks(page, "console")
    (folder / "logs.py").write_text(script)
    shown, real = _replay(session, folder, environ, "logs")
    assert _same(real) == _same(shown)


def _replay(session, folder, environ, experiment) -> tuple[str, str]:
    """Return what a page shows of a session with a shell, and what comes out here."""
    shown, real, run_id = "", "", "RUN_"
    for command, output in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, flags=re.MULTILINE):
        if found := sorted(folder.glob(f"checkpoints/{experiment}/RUN_*")):
            run_id = found[-1].name
        done = subprocess.run(
            ["sh", "-c", re.sub(r"RUN_[\d_]+", run_id, command)],
            cwd=folder, env=environ, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shown, real = shown + output, real + done.stdout
    return shown, real


def test_the_other_examples_of_the_readme_run_after_the_first(trained):
    folder, environ = trained
    if not (folder / "checkpoints").exists():
        pytest.fail("the first example did not run")
    _, resume, find = _blocks(README, "python")
    for code in ("import runmgr\n" + resume + "run.finish()\n", find):
        script = folder / "snippet.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, str(script)], cwd=folder, env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "True completed 5\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_are_valid(document):
    for block in _blocks(document.read_text(), "python"):
        compile(block, str(document), "exec")


def test_the_example_of_the_averages_prints_what_it_says(tmp_path):
    (code,) = _blocks((REPOSITORY / "docs/averages.md").read_text(), "python")
    script = tmp_path / "average.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loss is finite: True\nTrue\n"


CLI = (REPOSITORY / "docs/cli.md").read_text()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The three runs that docs/cli.md is about, made by the script that it shows."""
    return _project(tmp_path_factory.mktemp("cli"), "sweep.py", _blocks(CLI, "python")[0], [sys.executable, "sweep.py"])


def _project(folder, script, code, command):
    (folder / "pyproject.toml").touch()
    (folder / script).write_text(code)
    (folder / "bin").mkdir()
    (folder / "bin/runmgr").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m runmgr.cli "$@"\n')
    (folder / "bin/runmgr").chmod(0o755)
    environ = clean_environment(COLUMNS="80")
    environ.pop("RUNMGR_CKPT_ROOT_DIR", None)
    environ["PATH"] = f"{folder / 'bin'}:{environ['PATH']}"
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, timeout=100)
    return folder, environ


def _told(text: str) -> list[str]:
    """Leave the values, mask what differs from day to day and machine to machine; runs are known by their order."""
    for place, run_id in enumerate(sorted(set(re.findall(r"RUN_\d{8}_\d{6}_\d{6}", text)))):
        text = text.replace(run_id, f"RUN {place}")
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", "time", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]{8}", "time", text)
    text = re.sub(r"[\d.]+ [kM]?B\b", "size", text)
    text = re.sub(r"packages \d+;", "packages;", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_python_of_docs_cli_runs(swept):  # before the examples below, which remove a run
    folder, environ = swept
    done = subprocess.run(
        [sys.executable, "-c", _blocks(CLI, "python")[1]], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["[0.1]", "{'lr': (0.1, 0.3)}", "10"]


def test_docs_cli_shows_what_comes_out(swept):
    folder, environ = swept
    shown = real = ""
    for command, output in re.findall(
        r"^\$ (.*)\n((?:[^$].*\n)*)", "".join(_blocks(CLI, "console")), flags=re.MULTILINE
    ):
        done = subprocess.run(
            ["sh", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, timeout=100
        )
        real += f"$ {command}\n{done.stdout}{done.stderr}".replace(str(folder), "/home/you/project")
        shown += f"$ {command}\n{output}"
    assert _told(real) == _told(shown)


def test_docs_cli_has_an_example_of_every_command(swept):
    used = set(re.findall(r"^\$ runmgr (\S+)", "".join(_blocks(CLI, "console")), flags=re.MULTILINE))
    have_pages_of_their_own = {"tensorboard", "average"}
    assert used == {name for names in cli._COMMANDS.values() for name in names} - have_pages_of_their_own
