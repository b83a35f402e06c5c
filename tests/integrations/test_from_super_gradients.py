"""docs/from-super-gradients.md answers every item and names tests that exist; test_pages.py runs its code."""

from __future__ import annotations

import ast
import re

import pytest
from processes import REPOSITORY

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
