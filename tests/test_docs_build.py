"""The site of the documents is made without a warning, and what would be broken in it is one."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from processes import REPOSITORY, run

import runmgr
from runmgr.integrations import super_gradients

pytestmark = pytest.mark.long

FAULTS = {
    "[a](nowhere.md)": "'nowhere.md'",
    "[a](cli.md#nothing)": "'nothing'",
    "[a](../tests/nowhere)": "'../tests/nowhere'",
    "![a](nowhere.png)": "nowhere.png",
    "```{eval-rst}\n:py:class:`runmgr.disk.Nothing`\n```": "runmgr.disk.Nothing",
}


def build(repository, site):
    return run("bash", str(repository / "scripts/docs.sh"), str(site), VIRTUAL_ENV=sys.prefix)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY, folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_the_site_begins_at_its_root(site):
    (start,) = re.findall('url=([^"]+)', (site / "index.html").read_text())
    assert "half an hour" in (site / start).read_text()


@pytest.mark.parametrize("package", [runmgr, super_gradients], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference_and_says_what_it_is(site, package):
    page = (site / "docs/reference.html").read_text()
    described = set(re.findall(r'id="([\w.]+)"', page))
    elsewhere = set(runmgr.__all__) - {"runmgr"} if package is super_gradients else set()
    names = set(package.__all__) - elsewhere
    assert {f"{package.__name__}.{name}" for name in names} <= described
    generated = {name for name in names if (getattr(package, name).__doc__ or f"{name}(").startswith(f"{name}(")}
    assert generated == set()


def test_what_leads_nowhere_or_cannot_be_found_stops_the_build(tmp_path):
    repository = tmp_path / "repository"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "checkpoints", "__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY, repository, ignore=left_out)
    with (repository / "docs/logs.md").open("a") as page:
        page.write("\n".join(f"\n{fault}\n" for fault in FAULTS))
    (repository / "docs/alone.md").write_text("# Nobody leads here\n")
    done = build(repository, tmp_path / "site")
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for place in (*FAULTS.values(), "alone.md"):
        assert [line for line in warnings if place in line], (place, done.stderr)
