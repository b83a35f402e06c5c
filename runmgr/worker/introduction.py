"""What a run tells TensorBoard about itself: hyperparameters, so that runs compare in its table, and texts.

One summary each in the run's own events file, so that a run is one row, whatever its attempts. The summary that would
define the experiment's columns is left out: TensorBoard takes it from any one run, and without it unites those of all.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from typing import TYPE_CHECKING, Any

from runmgr.disk import drift, provenance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorboard.compat.proto.summary_pb2 import Summary

_TEXT_LIMIT = 500
_EXACT_INTEGERS = 1 << 53
_FENCE = "~~~~~~~~"


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | float | str]:
    """Return a plain, masked configuration by dotted keys, in the three types that TensorBoard knows.

    A list is its JSON text, None is "None", and a whole number that a double does not hold exactly is its digits.
    """
    return {_readable(name): _value(value) for name, value in drift.leaves(config).items()}


def _value(value: Any) -> bool | float | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and -_EXACT_INTEGERS <= value <= _EXACT_INTEGERS and math.isfinite(value):
        return float(value)
    text = value if isinstance(value, str) else "None" if value is None else json.dumps(value, ensure_ascii=False)
    text = _readable(text)
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def _readable(text: str) -> str:
    """Return text that a protocol buffer takes: valid Unicode."""
    return text.encode(errors="backslashreplace").decode()


def summaries(config: dict[str, Any], facts: dict[str, Any]) -> Iterator[Summary]:
    """Yield what an attempt writes first. `facts` is what its record and run.json say of it."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    masked = provenance.masked(config)[0]
    session = SessionStartInfo(start_time_secs=time.time())
    for name, value in hyperparameters(masked).items():
        field = {bool: "bool_value", float: "number_value", str: "string_value"}[type(value)]
        setattr(session.hparams[name], field, value)
    yield _hparams_summary("session_start_info", HParamsPluginData(session_start_info=session))
    for tag, text in _texts(masked, facts).items():
        yield _text_summary(tag, text)


def completed() -> Summary:
    """Return what says in the table that the run has come to its end.

    TensorBoard believes the first such word in a run for ever, so one that failed and may go on says nothing.
    """
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    end = SessionEndInfo(status=Status.Value("STATUS_SUCCESS"), end_time_secs=time.time())
    return _hparams_summary("session_end_info", HParamsPluginData(session_end_info=end))


def _hparams_summary(kind: str, data: Any) -> Summary:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    tag = {"session_start_info": metadata.SESSION_START_INFO_TAG, "session_end_info": metadata.SESSION_END_INFO_TAG}
    value = Summary.Value(tag=tag[kind], metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _text_summary(tag: str, text: str) -> Summary:
    from torch.utils.tensorboard.summary import text as summary_of

    found: Summary = summary_of(tag, _readable(text))  # type: ignore[no-untyped-call]
    return found


def _texts(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """Return the texts by their tags, as Markdown."""
    hosts = [str(host.get("host")) for host in facts.get("hosts") or []]
    command = f"{_fenced(shlex.join(map(str, facts.get('argv') or [])))}\n\n" + "\n".join(
        f"- {name}: {value}"
        for name, value in (
            ("attempt", facts.get("attempt")), ("directory", facts.get("cwd")), ("user", facts.get("user")),
            ("ranks", f"{facts.get('world_size')} on {', '.join(hosts)}"), ("started", facts.get("started")),
            ("torch", facts.get("torch")), ("Python", facts.get("python")),
        )
        if value is not None
    )  # fmt: skip
    texts = {"command": command, "config": _fenced(json.dumps(config, indent=1, ensure_ascii=False, default=str))}
    git = facts.get("git")
    if git:
        dirty = ", with uncommitted changes" if git.get("dirty") else ""
        texts["git"] = f"{git.get('commit')} on {git.get('branch')}{dirty}"
        if git.get("diff"):
            texts["git"] += "\n\n" + _fenced(git["diff"])
    return texts


def _fenced(text: str) -> str:
    return f"{_FENCE}\n{text.replace(_FENCE, '~')}\n{_FENCE}"
