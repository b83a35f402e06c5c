"""Git, packages, host, command line and configuration as plain data, with secrets masked.

`plain()` is also what makes any value fit for JSON and for `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import dataclasses
import enum
import getpass
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from runmgr.disk import directory

MASK = "********"
_SECRET = re.compile(
    r"(?:^|_)(?:api_?keys?|access_?keys?|secrets?|token|passw(?:or)?ds?|passphrase|credentials?|auth|cookies?|"
    r"private_?key|ssh_?key|pwd|dsn)(?:$|_)",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_ENVIRONMENT = re.compile(
    r"^(?:CUDA|NCCL|GLOO|TORCH|PYTORCH|TORCHELASTIC|OMP|MKL|SLURM|OMPI|PMI|RUNMGR|HF|WANDB|MLFLOW|CONDA|PYTHON|"
    r"KUBERNETES|XLA|HIP|ROCR)_|^(?:RANK|LOCAL_RANK|WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT|VIRTUAL_ENV)$"
)
_DIFF_LIMIT_BYTES = 16 << 10
_GIT_TIMEOUT_S = 10.0


def plain(value: Any) -> Any:  # noqa: C901, PLR0911  # one table of types
    """Return `value` made of dicts, lists, strings, numbers, booleans and None alone.

    Paths and enums become what they stand for, numpy and torch scalars numbers, non-finite floats strings
    (JSON has none), everything else its repr.
    """
    match value:
        case None | bool() | str() if not isinstance(value, enum.Enum):
            return value
        case enum.Enum():
            return plain(value.value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case bytes() | bytearray():
            return bytes(value).decode(errors="backslashreplace")
        case Sequence():
            return [plain(item) for item in value]
        case AbstractSet():
            return sorted((plain(item) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return plain(value.item())
    return repr(value)


def plain_config(config: Any) -> dict[str, Any]:
    """Turn what users call a configuration (Mapping, Namespace, dataclass, OmegaConf, None) into a plain dict."""
    if config is None:
        return {}
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(config):
        config = omegaconf.OmegaConf.to_container(config, resolve=True)
    elif not isinstance(config, Mapping) and not dataclasses.is_dataclass(config) and hasattr(config, "__dict__"):
        config = vars(config)
    found = plain(config)
    return found if isinstance(found, dict) else {"config": found}


def masked(value: Any, *, where: str = "") -> tuple[Any, list[str]]:
    """Return plain `value` with secrets replaced by `MASK`, and the key paths of what was masked."""
    paths: list[str] = []

    def walk(item: Any, path: str) -> Any:
        if isinstance(item, dict):
            return {
                key: hide(path, key)
                if _is_secret(key) and inner not in (None, "", True, False)
                else walk(inner, _join(path, key))
                for key, inner in item.items()
            }
        if isinstance(item, list):
            return [walk(inner, f"{path}[{index}]") for index, inner in enumerate(item)]
        if isinstance(item, str) and _URL_CREDENTIALS.search(item):
            paths.append(path)
            return _URL_CREDENTIALS.sub(MASK, item)
        return item

    def hide(path: str, key: str) -> str:
        paths.append(_join(path, key))
        return MASK

    return walk(value, where), paths


def masked_arguments(argv: Sequence[str]) -> list[str]:
    """Return the command line with the values of secret options (`--api-key X`, `token=X`) masked."""
    result: list[str] = []
    hide_next = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            result.append(MASK)
        elif equals and _is_secret(name):
            result.append(f"{name}={MASK}")
        else:
            result.append(_URL_CREDENTIALS.sub(MASK, argument))
        hide_next = argument.startswith("-") and not equals and _is_secret(name)
    return result


def collect() -> dict[str, Any]:
    """Say how this process came to be: command, code, packages, machine and the environment that steers training."""
    environment, _ = masked({name: value for name, value in sorted(os.environ.items()) if _ENVIRONMENT.match(name)})
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in many containers
        user = str(os.getuid())
    return {
        "argv": masked_arguments(sys.orig_argv),
        "cwd": os.getcwd(),
        "user": user,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git(directory.launched_from()),
        "packages": packages(),
        "environment": environment,
    }


def git(folder: Path) -> dict[str, Any] | None:
    """Return commit, branch, dirty flag and the difference to the commit (its first 16 KiB); None outside a repository."""

    def ask(*arguments: str) -> bytes | None:
        command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
        environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        try:
            done = subprocess.run(  # noqa: S603  # a fixed command
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                timeout=_GIT_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git, no such directory, or a very slow disk
            return None
        return done.stdout if done.returncode == 0 else None

    status = ask("status", "--porcelain=v2", "--branch", "--untracked-files=normal", "--no-renames", ".")
    if status is None:
        return None
    lines = status.decode(errors="replace").splitlines()
    heads = {words[1]: words[2] for line in lines if line.startswith("# ") and len(words := line.split(" ", 2)) > 2}
    commit = heads.get("branch.oid")
    dirty = any(not line.startswith("# ") for line in lines)
    diff = (ask("diff", "--no-ext-diff", "--no-color", "HEAD") or b"") if dirty else b""
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": heads.get("branch.head"),
        "dirty": dirty,
        "diff": diff[:_DIFF_LIMIT_BYTES].decode(errors="replace"),
        "diff_truncated": len(diff) > _DIFF_LIMIT_BYTES,
    }


def packages() -> dict[str, str]:
    """Return installed distributions and their versions, by the names of their metadata directories alone."""
    found: dict[str, str] = {}
    for entry in reversed(sys.path):  # what comes first on the path is what is imported
        try:
            names = os.listdir(entry or ".")
        except OSError:
            continue
        for name in names:
            stem, dot, _ = name.rpartition(".dist-info")
            if dot and "-" in stem:
                project, _, version = stem.rpartition("-")
                found[project.replace("_", "-").lower()] = version
    return dict(sorted(found.items()))


def pid_space() -> int | None:
    """Return what tells apart the sets of process ids that containers of one host count, or None where there are none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def devices() -> list[str]:
    """Return the models of this host's NVIDIA GPUs as the driver lists them; needs no CUDA context."""
    found = []
    try:
        gpus = sorted(Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return []
    for gpu in gpus:
        try:
            text = (gpu / "information").read_text()
        except OSError:
            continue
        found += [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Model:")]
    return found


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(re.sub(r"\W", "_", _CAMEL.sub("_", name))))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
