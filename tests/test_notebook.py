"""In a notebook: the page that says how, cell by cell in real kernels, and where its runs lie and how they end."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import ExitStack

import pytest
from kernels import kernel
from pages import RUN_ID, Told, agrees, mask, project
from processes import REPOSITORY

PAGE = REPOSITORY / "docs/how-to/notebooks.md"
pytestmark = pytest.mark.needs("ipykernel")


def _cells(text):
    """Return the cells of a page, each with the output that it shows."""
    text = text.partition("\n## On one GPU")[0]
    return re.findall(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)


def _masked(text):
    return mask(text, sorted(set(re.findall(RUN_ID, text))))


@pytest.mark.long
def test_the_page_shows_what_its_cells_print(tmp_path):
    environ = project(tmp_path)
    (first, _), *others = _cells(PAGE.read_text())
    with ExitStack() as kernels:
        notebook = kernels.enter_context(kernel(tmp_path, environ))
        assert notebook.run(first) == ""
        for code, shown in others:
            told_by = notebook
            if code.startswith("# after a restart of the kernel"):
                notebook.restart()
                assert notebook.run(first) == ""
            elif code.startswith("# in a second notebook"):
                told_by = kernels.enter_context(kernel(tmp_path, environ))
                assert told_by.run(first) == ""
            real = told_by.run(code, interrupt_after_s=1.0 if code.startswith("# stopped by hand") else None)
            told = Told(code, _masked(shown), _masked(real), 0)
            assert agrees(told), f"{code}{real}\nbut the page says:\n{shown}"


def test_a_notebooks_runs_lie_in_its_own_project_and_its_errors_do_not_end_them(tmp_path):
    environ = project(tmp_path)
    (tmp_path / "here").mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    (tmp_path / "here" / "new.py").touch()
    with kernel(tmp_path / "here", environ) as notebook:
        assert notebook.run("import runmgr\nrun = runmgr.start_run('exp')\nrun.save({'a': 1}, epoch=1); 0") == "0\n"
        assert notebook.run("plot(run)") == "NameError: name 'plot' is not defined\n"
        notebook.restart()
        (run_dir,) = (tmp_path / "checkpoints" / "exp").glob("RUN_*")
        record = json.loads((run_dir / "run.json").read_text())
        assert (record["status"], record["error"]) == ("interrupted", None)
        assert not list(run_dir.glob(".runmgr/failures/*"))
        assert record["git"]["dirty"]
        failing = "import runmgr\nwith runmgr.start_run('exp', resume='latest') as run:\n    1 / 0"
        assert "ZeroDivisionError: division by zero" in notebook.run(failing)
        record = json.loads((run_dir / "run.json").read_text())
        assert (record["attempt"], record["status"]) == (2, "failed")
