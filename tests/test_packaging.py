"""What users get: a wheel and an sdist, installed where the source is not, and then everything as the README says."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from pages import agrees, blocks, follow
from processes import REPOSITORY, clean_environment

pytestmark = pytest.mark.long
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NAME = f"runmgr-{PROJECT['version']}"
# Some that take seconds: of the wheel, and of what its libraries are asked for
QUICK = ("test_public_api.py", "test_imports.py", "test_surface.py", "test_cli.py", "disk/test_checkpoints.py")
OF_LIBRARIES = (
    "disk/test_events.py",
    "disk/test_lease.py",
    "worker/test_system.py",
    "cli/test_terminal.py",
    "test_surface.py",
)


def _call(*argv, cwd, **environ) -> str:
    environment = clean_environment(**environ)
    del environment["PYTHONPATH"]
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}"
    return done.stdout


def _pip(*arguments, cwd) -> str:
    return _call(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments, cwd=cwd)


def _tracked(folder: Path) -> Path:
    """A copy of the files that git knows, as they are now."""
    named = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
    for name in filter(None, named.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist; what they were built from is gone."""
    folder = tmp_path_factory.mktemp("dist")
    source = _tracked(tmp_path_factory.mktemp("source"))
    code = "import os; from setuptools import build_meta as b; b.build_sdist(os.environ['D']); b.build_wheel(os.environ['D'])"
    _call(sys.executable, "-c", code, cwd=source, D=str(folder))
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def from_sdist(built, tmp_path_factory) -> Path:
    """The wheel that pip builds from the sdist, with the newest setuptools that pyproject.toml admits."""
    folder = tmp_path_factory.mktemp("from_sdist")
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(built / f"{NAME}.tar.gz"), cwd=folder)
    return folder / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(from_sdist, tmp_path_factory) -> Path:
    """The `bin` of a virtual environment that has the wheel and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    _call(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    options = ("--no-compile", "--constraint", str(REPOSITORY / "constraints.txt"))  # what is imported is compiled then
    _pip("--python", str(folder / "bin/python"), "install", *options, str(from_sdist), cwd=folder)
    return folder / "bin"


@pytest.fixture
def environ(installed, tmp_path) -> dict[str, str]:
    """The environment of somebody who works in a project of his own."""
    (tmp_path / "pyproject.toml").touch()
    found = clean_environment(COLUMNS="80")
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "RUNMGR_CKPT_ROOT_DIR"):
        found.pop(name, None)
    return found | {"PATH": f"{installed}:{found['PATH']}"}


def _names(built: Path) -> tuple[set[str], set[str]]:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel, tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        return set(wheel.namelist()), {name.partition("/")[2] for name in sdist.getnames()}


def test_wheel_and_sdist_hold_the_package_and_nothing_foreign(built):
    wheel, sdist = _names(built)
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "runmgr").rglob("*.py")} | {
        "runmgr/py.typed"
    }
    information = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert wheel == package | {f"{NAME}.dist-info/{name}" for name in information}
    assert sdist >= package | {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO"}


def test_the_metadata_are_the_projects(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        found = email.message_from_string(wheel.read(f"{NAME}.dist-info/METADATA").decode())
        entries = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert entries.split() == ["[console_scripts]", "runmgr", "=", "runmgr.cli:main"]
    assert (found["Name"], found["Version"], found["Requires-Python"]) == ("runmgr", PROJECT["version"], ">=3.11")
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (REPOSITORY / "README.md").read_text().strip()
    without_extras = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in without_extras) == sorted(
        re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]
    )


def test_the_sdist_builds_the_same_wheel(built, from_sdist):
    def content(path):
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith(("/WHEEL", "/RECORD"))}

    assert content(built / from_sdist.name) == content(from_sdist)  # but for the line that names the setuptools


def test_the_readmes_example_runs_from_the_wheel_with_two_ranks(installed, environ, tmp_path):
    where = _call(str(installed / "python"), "-c", "import runmgr; print(runmgr.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(installed.parent)
    told = list(follow((REPOSITORY / "README.md").read_text(), tmp_path, environ))
    assert [one.command.split()[0] for one in told] == ["torchrun", "runmgr", "ls"]
    assert [one for one in told if not agrees(one)] == []


def test_it_runs_on_one_cpu_and_in_the_shell(installed, environ, tmp_path):
    (tmp_path / "train.py").write_text(blocks((REPOSITORY / "README.md").read_text(), "python")[0])
    for command, shown in (
        ("torchrun --standalone --nproc-per-node=1 train.py", ""),
        ("runmgr ls sums", "completed"),
        ("python -m runmgr.cli show sums/best", "completed"),
        ("runmgr doctor checkpoints", "checkpoints"),
        ("runmgr verify sums --deep", ""),
        ("runmgr --version", f"runmgr {PROJECT['version']}"),
    ):
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout


def test_a_type_checker_knows_the_public_names_of_the_wheel(installed, tmp_path):
    shutil.copy(REPOSITORY / "tests/typing/api.py", tmp_path)
    options = ("--strict", "--config-file=", "--python-executable", str(installed / "python"))
    _call(sys.executable, "-m", "mypy", *options, "api.py", cwd=tmp_path)


def test_the_tests_pass_against_the_wheel(installed, environ, tmp_path):
    _tests(installed, environ, tmp_path, QUICK)


def test_the_tests_pass_with_the_oldest_libraries_that_are_stated(built, environ, tmp_path):
    """All but torch, whose oldest build on PyPI brings gigabytes of CUDA."""
    _call(sys.executable, "-m", "venv", "--without-pip", "old", cwd=tmp_path)
    stated = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["system"]]
    oldest = [line.partition(";")[0].replace(">=", "==") for line in stated if not line.startswith("torch")]
    wheel = str(built / f"{NAME}-py3-none-any.whl")
    options = ("--python", str(tmp_path / "old/bin/python"), "install", "--no-compile", "--no-deps")
    _pip(*options, wheel, *map(str.strip, oldest), cwd=tmp_path)
    _tests(tmp_path / "old/bin", environ, tmp_path, OF_LIBRARIES)


def _tests(bin_, environ, folder, names) -> None:
    """Run tests where the source is not; pytest and what else is missing is lent from here, behind what is installed there."""
    for name in ("tests", "docs", "benchmarks", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, folder / name)
    (site,) = (bin_.parent / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    try:
        done = subprocess.run(
            [str(bin_ / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names)],
            cwd=folder, env=environ, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert " passed" in done.stdout
    finally:
        (site / "lent.pth").unlink()
