"""What the documents say is executed, see also `test_pages.py`; and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pages import DOCUMENTS, agrees, blocks, follow, project
from processes import REPOSITORY

from runmgr import cli

README = (REPOSITORY / "README.md").read_text()


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The README's first example, run by its own commands in an empty project."""
    folder = tmp_path_factory.mktemp("readme")
    environ = project(folder)
    return folder, environ, list(follow(README, folder, environ))


def test_the_readme_shows_what_its_example_prints(followed):
    _, _, found = followed
    assert found
    assert [told for told in found if not agrees(told)] == []


def test_the_other_examples_of_the_readme_run_after_the_first(followed):
    folder, environ, _ = followed
    _, resume, find = blocks(README, "python")
    for code in ("import runmgr\n" + resume + "run.finish()\n", find):
        (folder / "snippet.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "snippet.py"], cwd=folder, env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "True completed 5\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_are_valid(document):
    for block in blocks(document.read_text(), "python"):
        compile(block, str(document), "exec")


def test_docs_cli_has_an_example_of_every_command():
    text = (REPOSITORY / "docs/cli.md").read_text()
    used = set(re.findall(r"^\$ runmgr (\S+)", "".join(blocks(text, "console")), flags=re.MULTILINE))
    have_pages_of_their_own = {"tensorboard", "average"}
    assert used == {name for names in cli._COMMANDS.values() for name in names} - have_pages_of_their_own
