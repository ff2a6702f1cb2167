"""From a record of metrics.jsonl to MLflow's points: names, numbers and step axes that the store accepts.

    {"step": 120, "time_ms": ..., "train/loss": 5.31, "train/tokens": 491520.0}
      ->  train/loss at step 120,  train/tokens at step 120,  tokens/train_loss at step 491520

The axis of MLflow's charts is an integer that comes with the point.  Runs with different batch sizes can only be
compared over tokens, so what matters most is logged once more under `tokens/`, with the tokens as its step.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_NAME = 250
TOKEN_AXIS = {
    "train/loss": "tokens/train_loss",
    "train/grad_norm": "tokens/grad_norm",
    "val/loss": "tokens/val_loss",
}
"""Metrics with a second copy in MLflow whose step is the number of tokens trained on."""


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    time_ms: int
    step: int


def clean_name(name: str) -> str:
    """`name` as MLflow takes it: other characters become `_`, empty and dotted path parts go, 250 characters."""
    parts = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:MAX_NAME].rstrip("/")


def points_of(record: Mapping[str, Any]) -> tuple[list[Point], int]:
    """The points of one metrics.jsonl record and how many of its values are not finite.

    MLflow would store inf as 1.8e308 and spoil every plot, so such values stay in metrics.jsonl alone and their
    number is sent as `tracking/nonfinite`.
    """
    time_ms, step = int(record["time_ms"]), int(record["step"])
    values = {clean_name(k): float(v) for k, v in record.items() if k not in ("step", "time_ms")}
    finite = [Point(name, v, time_ms, step) for name, v in values.items() if math.isfinite(v)]
    nonfinite = len(values) - len(finite)
    tokens = values.get("train/tokens")
    if tokens is not None and math.isfinite(tokens):
        finite += [p._replace(name=TOKEN_AXIS[p.name], step=int(tokens)) for p in finite if p.name in TOKEN_AXIS]
    if nonfinite:
        finite.append(Point("tracking/nonfinite", float(nonfinite), time_ms, step))
    return finite, nonfinite
