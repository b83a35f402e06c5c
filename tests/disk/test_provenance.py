from __future__ import annotations

import argparse
import enum
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from runmgr.disk import provenance
from runmgr.disk.provenance import MASK


class _Color(enum.Enum):
    RED = "red"


@dataclass
class _Options:
    lr: float = 0.1
    where: Path = Path("/data")


@pytest.mark.parametrize(
    "name", ["api_key", "apiKey", "API-KEY", "hfToken", "password", "db_passwd", "client_secret", "auth", "credentials"]
)
def test_secrets_are_masked_and_listed_wherever_they_lie(name):
    config = provenance.plain_config({"a": [{name: "hunter2"}], "b": 1})
    masked, paths = provenance.masked(config)
    assert masked == {"a": [{name: MASK}], "b": 1}
    assert paths == [f"a[0].{name}"]


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "num_tokens", "author", "keyboard", "passes"])
def test_what_only_sounds_like_a_secret_is_kept(name):
    assert provenance.masked({name: "value"}) == ({name: "value"}, [])


def test_credentials_in_urls_and_on_the_command_line_are_masked():
    assert provenance.masked({"url": "https://me:pw@host/x"}) == ({"url": f"https://{MASK}@host/x"}, ["url"])
    given = ["train.py", "--api-key", "k", "--token=t", "--author", "me", "s3://a:b@c"]
    assert provenance.masked_arguments(given) == [
        "train.py", "--api-key", MASK, f"--token={MASK}", "--author", "me", f"s3://{MASK}@c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("/x"), "/x"), (_Color.RED, "red"), (np.float32(0.5), 0.5), (np.int64(3), 3), (torch.tensor(2), 2),
        (float("nan"), "nan"), (float("-inf"), "-inf"), ((1, 2), [1, 2]), ({3, 1}, [1, 3]), (b"ab", "ab"), (None, None),
        (True, True), (_Options(), {"lr": 0.1, "where": "/data"}), ({1: {"a": Path("b")}}, {"1": {"a": "b"}}),
    ],
)  # fmt: skip
def test_any_value_becomes_plain(value, expected):
    found = provenance.plain(value)
    assert (found, type(found)) == (expected, type(expected))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}), ({"lr": 1}, {"lr": 1}), (argparse.Namespace(lr=1), {"lr": 1}),
        (_Options(), {"lr": 0.1, "where": "/data"}),
    ],
    ids=["none", "dict", "namespace", "dataclass"],
)  # fmt: skip
def test_what_users_call_a_configuration(config, expected):
    assert provenance.plain_config(config) == expected


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "trunk")
    (tmp_path / "train.py").write_text("lr = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    git("remote", "add", "origin", "https://me:hunter2@host/x")
    return tmp_path


def test_git_names_the_commit_and_whether_it_is_what_ran(repository):
    found = provenance.git(repository)
    assert len(found["commit"]) == 40
    assert (found["branch"], found["dirty"], found["diff"]) == ("trunk", False, "")
    assert "hunter2" not in json.dumps(found)
    (repository / "new.py").touch()
    assert provenance.git(repository)["dirty"] is True
    (repository / "train.py").write_text("lr = 2\n")
    assert "+lr = 2" in provenance.git(repository)["diff"]


def test_a_long_difference_is_cut_and_says_so(repository):
    (repository / "train.py").write_text("x\n" * 100_000)
    found = provenance.git(repository)
    assert len(found["diff"]) == 16 << 10
    assert found["diff_truncated"] is True


def test_without_git_or_outside_a_repository_there_is_none(tmp_path, repository):
    assert provenance.git(Path("/")) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "nothing"))
        assert provenance.git(repository) is None


def test_a_start_is_described_without_its_secrets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "hunter2")
        found = provenance.collect()
    assert isinstance(found["argv"], list)
    assert found["environment"]["WANDB_API_KEY"] == MASK
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "hunter2" not in json.dumps(found)
