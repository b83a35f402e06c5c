"""What the documents say is executed, and what they show is what comes out."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from processes import REPOSITORY, clean_environment

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
            cwd=folder, env=environ, capture_output=True, text=True, timeout=100,
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
            [sys.executable, str(script)], cwd=folder, env=environ, capture_output=True, text=True, timeout=100
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
