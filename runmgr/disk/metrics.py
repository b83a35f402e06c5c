"""What checkpoints were measured at: reading a metric, and which of two is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runmgr.disk.checkpoints import Mode

_COUNTS = ("epoch", "step")


def is_better(new: float | None, old: float | None, mode: Mode) -> bool:
    """Whether `new` beats `old`. Ties keep the old one; what is missing or not finite never wins."""
    if new is None or not math.isfinite(new):
        return False
    if old is None or not math.isfinite(old):
        return True
    return new > old if mode == "max" else new < old


def value_of(checkpoint: Any, name: str) -> float | None:
    """Return a metric of a checkpoint as run.json sums it up, or its epoch or step; None where it has none."""
    if not isinstance(checkpoint, dict):
        return None
    metrics = checkpoint.get("metrics")
    if isinstance(metrics, dict) and name in metrics:
        return number(metrics[name])
    return number(checkpoint.get(name)) if name in _COUNTS else None


def metric_names(*checkpoints: Any) -> set[str]:
    """Return the names of the metrics that checkpoints have."""
    found = (checkpoint.get("metrics") for checkpoint in checkpoints if isinstance(checkpoint, dict))
    return {str(name) for metrics in found if isinstance(metrics, dict) for name in metrics}


def number(value: object) -> float | None:
    """Return a value as a number, also "nan" and "inf", which JSON writes as text."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
