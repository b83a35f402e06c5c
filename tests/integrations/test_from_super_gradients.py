"""docs/from-super-gradients.md answers every item, names tests that exist, and its code runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from processes import REPOSITORY, clean_environment

PAGE = (REPOSITORY / "docs" / "from-super-gradients.md").read_text()
ANSWERS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
FAULTS = re.findall(r"^\| (SG-\d+) \| .+ \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def tests():
    """The names of all tests."""
    trees = (ast.parse(path.read_text()) for path in (REPOSITORY / "tests").rglob("test_*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_item_and_every_fault_has_an_answer_and_a_test_that_exists(tests):
    assert [int(number) for number, *_ in ANSWERS] == list(range(1, 54))
    assert [name for name, _ in FAULTS] == [f"SG-{number}" for number in range(16)]
    assert {verdict for _, _, verdict, _, _ in ANSWERS} == {"there", "better", "no"}
    named = {name for *_, name in ANSWERS} | {name for _, name in FAULTS}
    assert named - tests == set()


@pytest.mark.long
def test_the_code_of_the_page_runs(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    script = tmp_path / "train.py"
    script.write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)))
    environ = clean_environment()
    environ.pop("RUNMGR_CKPT_ROOT_DIR", None)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "checkpoints" / "sums").glob("RUN_*")
    assert re.fullmatch(rf"\d+ files in {run.name}\n", done.stdout)
    names = {path.name for path in run.glob("*.pth")}
    assert names == {"average_model.pth", "ckpt_best.pth", "ckpt_epoch_2.pth", "ckpt_latest.pth"}
