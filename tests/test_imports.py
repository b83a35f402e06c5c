"""The house's one-way streets: who may import whom, and where each kind of line may stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from processes import clean_environment

import runmgr

PACKAGE = Path(runmgr.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and the rooms named here; `inside` only within a function, when a command asks for it.
MAY_IMPORT = {
    "errors": set(),
    "ranks": {"errors"},
    "disk": {"errors", "ranks"},
    "launch": {"errors", "ranks", "disk"},
    "relay": set(),  # torchrun itself, which launch starts
    "cli": {"errors", "ranks", "disk", "launch"},
    "worker": {"errors", "ranks", "disk"},
    "run": {"errors", "ranks", "disk", "worker"},
    "opening": {"errors", "ranks", "disk", "worker", "run"},
    "start": {"errors", "ranks", "disk", "worker", "run", "opening"},
    "integrations": {"errors", "ranks", "disk", "worker", "run", "start", ""},
    "examples": {"errors", ""},
    "": set(),  # the package itself: names are loaded on first use, see test_public_api.py
}
MAY_IMPORT_INSIDE = {"cli": {"run", "start", ""}}
TORCH_FREE = ("errors", "ranks", "disk", "launch", "cli", "")
HEAVY = ("torch", "tensorboard", "numpy", "rich", "plotille", "shtab")
MAY_LOAD_INSIDE = {"cli": {"rich", "plotille", "shtab"}, "disk": {"tensorboard"}}  # none of them loads torch

# The calls that may stand in these files alone (design.md §4, "Where a line goes").
HOMES = {
    "disk/atomic.py": {"os.replace", "os.rename", "os.fsync", "os.fdatasync", "os.link"},
    "disk/probe_host.py": {"os.replace", "os.fsync", "os.link"},  # asks how the raw calls behave, keeps nothing
    "worker/writing.py": {"torch.save"},
    "worker/loading.py": {"torch.load"},
    "worker/agreement.py": {"dist.*", "TCPStore"},
    "worker/asking.py": {"dist.*"},  # the store's type
    "worker/state.py": {"dist.*"},
    "worker/sharding.py": {"dist.*"},
    "worker/preemption.py": {"signal.signal"},
    "worker/tee.py": {"signal.signal"},  # a process of its own
    "relay.py": {"signal.signal", "dist.*"},  # torchrun's main
    "examples": {"dist.*"},  # a user's script, which opens its own process group
}
GUARDED = set().union(*HOMES.values())
FULL_NAMES = {
    "torch.distributed": "dist",
    "torch.distributed.TCPStore": "TCPStore",
    "torch.distributed.distributed_c10d": "dist",
}


def room(module: str) -> str:
    """runmgr.disk.atomic → disk; runmgr → ''."""
    return module.split(".")[1] if "." in module else ""


def module_of(path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known(name: str) -> bool:
    place = PACKAGE.parent / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").exists()


def imports_of(tree: ast.AST, package: str):
    """Yield (line, module, whether inside a function) for every import, relative ones too; not those for type checkers."""

    def walk(node, inside):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for child in node.orelse:
                yield from walk(child, inside)
            return
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if base.split(".")[0] == "runmgr" and known(whole) else base, inside
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "import_module",
            "importlib.import_module",
            "__import__",
        }:
            given = node.args[0]
            yield node.lineno, given.value if isinstance(given, ast.Constant) else "", inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, inside=False)


def wrong_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    package = module if is_package else module.rpartition(".")[0]
    here = room(module)
    found = []
    for line, target, inside in imports_of(ast.parse(source), package):
        if target.split(".")[0] != "runmgr":
            heavy = target.split(".")[0] in HEAVY
            if heavy and here in TORCH_FREE and not (inside and target.split(".")[0] in MAY_LOAD_INSIDE.get(here, ())):
                found.append(f"{module}:{line} imports {target}, but this side is torch-free")
            continue
        allowed = MAY_IMPORT[here] | {here} | (MAY_IMPORT_INSIDE.get(here, set()) if inside else set())
        if room(target) not in allowed:
            found.append(f"{module}:{line} imports {target}")
    return found


def called_names(tree: ast.AST):
    """Yield (line, dotted name) of every attribute and imported name, with import aliases resolved."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    aliases[alias.asname] = alias.name
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = ast.unparse(node)
            if all(part.isidentifier() for part in name.split(".")):
                first, dot, rest = name.partition(".")
                yield node.lineno, aliases.get(first, first) + dot + rest


def misplaced(source: str, path: str) -> list[str]:
    """Return the guarded calls in `source` that may not stand in the file `path`."""
    allowed = HOMES.get(path, set()) | HOMES.get(path.partition("/")[0], set())
    found = []
    for line, name in called_names(ast.parse(source)):
        kind = name
        if name in FULL_NAMES:
            kind = FULL_NAMES[name]
        elif name.startswith("torch.distributed."):
            kind = "dist.*"
        if kind.rpartition(".")[2] == "TCPStore":
            kind = "TCPStore"
        if kind in GUARDED and kind not in allowed:
            found.append(f"{path}:{line} uses {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    is_package = path.name == "__init__.py"
    if path == PACKAGE / "__init__.py":
        return  # test_public_api.py
    assert wrong_imports(path.read_text(), module_of(path), is_package=is_package) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_durable_writes_checkpoint_bytes_store_and_signals_each_have_one_home(path):
    assert misplaced(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runmgr.errors", "import runmgr.ranks"),
        ("runmgr.ranks", "from runmgr.disk import atomic"),
        ("runmgr.disk.atomic", "from ..worker import logs"),
        ("runmgr.disk.atomic", "from . import missing\nfrom .. import worker"),
        ("runmgr.disk.atomic", "def f():\n    import torch.nn"),
        ("runmgr.disk.catalog", "from runmgr.launch import main"),
        ("runmgr.launch", "from runmgr import cli"),
        ("runmgr.cli.runs", "def f():\n    from runmgr.worker import saving"),
        ("runmgr.cli.runs", "from runmgr import start"),
        ("runmgr.cli.tables", "import rich.table"),
        ("runmgr.disk.events", "def f():\n    import rich"),
        ("runmgr.cli.runs", "from runmgr.run import Run"),
        ("runmgr.worker.logs", "class A:\n    def f(self):\n        from runmgr.cli import runs"),
        ("runmgr.worker.logs", "import importlib\nimportlib.import_module('runmgr.run')"),
        ("runmgr.worker.logs", "from runmgr.start import start_run"),
        ("runmgr.run", "from runmgr.start import start_run"),
        ("runmgr.start", "from runmgr.examples import digits"),
        ("runmgr.run", "def f():\n    from runmgr.integrations import super_gradients"),
        ("runmgr.cli.runs", "def f():\n    from runmgr.integrations.super_gradients import is_run_dir"),
        ("runmgr.examples.digits", "from runmgr.worker import averaging"),
    ],
)
def test_a_planted_import_is_found(module, source):
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runmgr.cli.runs", "def f():\n    from runmgr.run import Run\n    from runmgr.start import start_run"),
        (
            "runmgr.disk.atomic",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from runmgr.worker import logs",
        ),
        ("runmgr.disk.record", "from . import atomic\nfrom runmgr.errors import RunError"),
        ("runmgr.cli.tables", "def f():\n    from rich.table import Table"),
        ("runmgr.worker.saving", "import torch\nfrom runmgr.disk import atomic"),
    ],
)
def test_a_right_import_is_let_through(module, source):
    assert wrong_imports(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.replace(1, 2)",
        "from os import fsync as safe\nsafe(1)",
        "import os as o\no.link(1, 2)",
        "import torch\ntorch.save(1, 2)",
        "from torch import load\nload(1)",
        "import torch.distributed as dist\ndist.barrier()",
        "import torch\ntorch.distributed.broadcast(1)",
        "from torch.distributed import TCPStore\nTCPStore()",
        "import signal\nsignal.signal(15, None)",
    ],
)
def test_a_planted_call_is_found(source):
    assert misplaced(source, "disk/catalog.py")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_sub_packages_re_export_nothing(path):
    (first, *rest) = ast.parse(path.read_text()).body
    assert isinstance(first, ast.Expr)
    assert isinstance(first.value, ast.Constant)
    if path.parent.name != "cli":  # the console command's door
        assert rest == []


def test_the_torch_free_side_loads_where_torch_is_missing():
    modules = [module_of(path) for path in FILES if room(module_of(path)) in TORCH_FREE and path.name != "__main__.py"]
    assert {"runmgr", "runmgr.errors", "runmgr.ranks", "runmgr.disk.atomic", "runmgr.disk.catalog"} < set(modules)
    code = (
        f"import importlib, sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"import runmgr\nfor name in ('list_runs', 'Keep', 'RunError'): getattr(runmgr, name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_library_import_starts_nothing_and_prints_nothing(tmp_path):
    code = (
        "import threading, logging, signal, sys, os\n"
        "before = dict(os.environ), signal.getsignal(signal.SIGTERM), logging.getLogger().handlers[:]\n"
        "import runmgr.start\n"
        "assert before == (dict(os.environ), signal.getsignal(signal.SIGTERM), logging.getLogger().handlers[:])\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
