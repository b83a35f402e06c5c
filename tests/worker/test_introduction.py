"""What a configuration becomes in TensorBoard's table, and what the texts say."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from runmgr.disk import provenance
from runmgr.worker import introduction


@dataclasses.dataclass
class _Model:
    depth: int = 3
    act: str = "gelu"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"lr": 0.1, "seed": 3, "amp": True}, {"lr": 0.1, "seed": 3.0, "amp": True}),
        (argparse.Namespace(optimizer="adam", resume=None), {"optimizer": "adam", "resume": "None"}),
        ({"model": _Model(), "a": {"b": {"c": 1}}}, {"model.depth": 3.0, "model.act": "gelu", "a.b.c": 1.0}),
        ({"layers": [4, {"x": None}], "empty": {}, "none": []}, {"layers": '[4, {"x": null}]', "empty": "{}", "none": "[]"}),
        ({"lr": float("nan"), "cap": float("inf")}, {"lr": "nan", "cap": "inf"}),
        ({"seed": 2**53, "id": 2**53 + 1, "huge": 10**400}, {"seed": 2.0**53, "id": str(2**53 + 1), "huge": "1" + "0" * 400}),
        ({"name": "x" * 1000, "wörter": "🎉", "bad": "a\udcffb", "b\udcff": 1},
         {"name": "x" * 499 + "…", "wörter": "🎉", "bad": "a\\udcffb", "b\\udcff": 1.0}),
        ({"wandb": {"api_key": "sk-1"}, "url": "https://me:pw@host/x"},
         {"wandb.api_key": "********", "url": "https://********@host/x"}),
        (None, {}),
        ("text", {"config": "text"}),
    ],
    ids=["scalars", "namespace", "dotted", "lists", "non-finite", "whole numbers", "strings", "secrets", "none", "odd"],
)  # fmt: skip
def test_a_configuration_is_dotted_keys_of_three_types(config, found):
    plain = provenance.plain_config(config)
    assert introduction.hyperparameters(provenance.masked(plain)[0]) == found
    start, *_ = introduction.summaries(plain, {})
    session = parse_session_start_info_plugin_data(start.value[0].metadata.plugin_data.content)
    read = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    assert read == found
    assert {name: type(value) for name, value in read.items()} == {name: type(value) for name, value in found.items()}


def _texts(facts, config=None):
    _, *texts = introduction.summaries(config or {}, facts)
    return {text.value[0].tag: text.value[0].tensor.string_val[0].decode() for text in texts}


def test_the_texts_say_what_ran_and_no_diff_ends_its_own_frame():
    git = {"commit": "abc", "branch": "main", "dirty": True, "diff": "+~~~~~~~~\n+<b>~~~\udcff"}
    hosts = [{"host": "n1"}, {"host": "n2"}]
    texts = _texts({"argv": ["python", "a b.py"], "cwd": "/a\udcff", "hosts": hosts, "world_size": 16, "git": git})
    assert texts["command/text_summary"].startswith("~~~~~~~~\npython 'a b.py'\n~~~~~~~~\n\n")
    assert "\n- directory: /a\\udcff\n" in texts["command/text_summary"]
    assert texts["command/text_summary"].endswith("\n- ranks: 16 on n1, n2")
    assert texts["git/text_summary"].startswith("abc on main, with uncommitted changes\n\n~~~~~~~~\n+~\n")
    assert texts["git/text_summary"].count("~~~~~~~~") == 2
    assert set(_texts({"git": None}, {"token": "x"})) == {"command/text_summary", "config/text_summary"}
    assert _texts({}, {"token": "x"})["config/text_summary"] == '~~~~~~~~\n{\n "token": "********"\n}\n~~~~~~~~'
