"""Whoever follows a page of the documents sees what it shows."""

from __future__ import annotations

import pytest
from pages import DOCUMENTS, agrees, blocks, follow, project
from processes import REPOSITORY

QUICK = ("docs/averages.md", "docs/cli.md", "docs/logs.md")
NEEDED = {"docs/how-to/backups.md": "rsync", "docs/how-to/wandb.md": "wandb"}
PAGES = [page for page in DOCUMENTS if blocks(page.read_text(), "console") and page.name != "README.md"]  # test_docs.py


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=name,
            marks=[pytest.mark.long] * (name not in QUICK)
            + [pytest.mark.needs(tool) for page_name, tool in NEEDED.items() if page_name == name],
        )
        for page in PAGES
        for name in (page.relative_to(REPOSITORY).as_posix(),)
    ],
)
def test_a_page_shows_what_its_commands_print(page, tmp_path):
    for told in follow(page.read_text(), tmp_path, project(tmp_path)):
        assert agrees(told), f"$ {told.command}{told.real}\nbut the page says:\n{told.shown}"


PAGE = """
```bash
#!/bin/bash
# scripts/greet.sh
echo hello; echo "in $PWD"; echo "at 1.5 s"; exit $1
```

```console
$ export STATUS=0
$ bash scripts/greet.sh \\
> $STATUS
hello
in /home/you/project
at 2.25 s
$ bash scripts/greet.sh 0
…
at … s
```
"""


def test_a_page_that_is_right_agrees(tmp_path):
    found = list(follow(PAGE, tmp_path, project(tmp_path)))
    assert len(found) == 3
    assert all(agrees(told) for told in found)


@pytest.mark.parametrize("wrong", [("hello\nin", "hi\nin"), ("greet.sh 0", "greet.sh 1"), ("at 2.25 s\n", "")])
def test_a_page_that_is_wrong_does_not(tmp_path, wrong):
    assert not all(agrees(told) for told in follow(PAGE.replace(*wrong), tmp_path, project(tmp_path)))
