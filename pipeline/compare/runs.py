"""One run as a comparison sees it: configuration, numbers over tokens, machine.

Everything is over tokens, not over steps: a step of one run may hold twice the tokens of a step of another.  What was
logged without its tokens (held-out losses of old runs) is placed between its neighbours by step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.config import Config
from pipeline.config_loader import load_config
from pipeline.figures import Records, read_run, tokens_at
from pipeline.metrics import series
from pipeline.run_directory import RunDirectory
from pipeline.sizes import flops_per_token

SKIPPED_OPERATIONS = 4
"""Operations per weight and token that a zero input spares: two of the forward pass, two of the weight's gradient.
The two of the input's gradient stay, because gradients go straight through the selection (arXiv 2407.10969 eq. 8)."""


class Curve(NamedTuple):
    """Finite values of one metric, in the order of training."""

    tokens: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class ComparedRun:
    """What is known of one run.

    Attributes:
        name: label in tables and figures, unique within a comparison.
        path: its directory.
        records: metrics.jsonl.
        settings: every configuration key as text, dotted.
        config: the configuration; None if it is of another version of the program and does not load.
        facts: environment.json.
        state: state of status.json; `unknown` without it.
    """

    name: str
    path: Path
    records: Records
    settings: Mapping[str, str]
    config: Config | None
    facts: Mapping[str, Any]
    state: str

    def curve(self, metric: str) -> Curve:
        """One metric over tokens; empty if the run has not logged it, or no tokens."""
        steps, values = series(self.records, metric)
        tokens = tokens_at(self.records, steps)
        if tokens is None or not steps:
            return Curve(np.empty(0), np.empty(0))
        finite = np.isfinite(values)
        return Curve(np.asarray(tokens)[finite], np.asarray(values, dtype=float)[finite])

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric."""
        values = self.finite(metric)
        return float(values[-1]) if len(values) else None

    def finite(self, metric: str) -> np.ndarray:
        """All finite values of a metric."""
        values = np.asarray(series(self.records, metric)[1], dtype=float)
        return values[np.isfinite(values)]

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Names of everything that was logged."""
        return frozenset(name for record in self.records for name in record)

    @cached_property
    def operations(self) -> "Operations | None":
        """Floating-point operations over training; None where the model's size is not known."""
        vocab_size = self.facts.get("vocab_size") or (self.config.model.vocab_size if self.config else None)
        steps, tokens = series(self.records, "train/tokens")
        if self.config is None or not vocab_size or not steps:
            return None
        dense = flops_per_token(self.config, int(vocab_size))
        skipped = np.interp(steps, *self._skipped_weights(steps)) * SKIPPED_OPERATIONS
        increments = np.diff(np.asarray(tokens), prepend=0.0)
        return Operations(np.asarray(tokens), dense * np.asarray(tokens), np.cumsum(increments * (dense - skipped)))

    def _skipped_weights(self, steps: Sequence[int]) -> tuple[Sequence[int], np.ndarray]:
        """Steps, and how many weights of the projections met a zero input there: N S, from N (1 - S) and S."""
        known, activated = series(self.records, "qsparse/activated_parameters")
        sparsity = np.asarray(series(self.records, "qsparse/sparsity")[1])
        if not known or len(known) != len(sparsity):
            return steps, np.zeros(len(steps))
        return known, np.asarray(activated) * sparsity / np.maximum(1e-9, 1.0 - sparsity)


class Operations(NamedTuple):
    """Operations spent until each record."""

    tokens: np.ndarray
    dense: np.ndarray
    """As if nothing were zero: 6 N + attention per token, the yardstick of MFU."""
    needed: np.ndarray
    """Without those that a zero input spares, `SKIPPED_OPERATIONS` each."""


def load_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read run directories; runs of the same name get their parent folder in front.

    Raises:
        ValueError: a folder is not that of a run, or has logged nothing.
    """
    names = [path.resolve().name for path in paths]
    labels = [
        f"{path.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    return [_load(path, label) for path, label in zip(paths, labels, strict=True)]


def _load(path: Path, name: str) -> ComparedRun:
    directory = RunDirectory(path)
    status = directory.read_status()
    facts = json.loads(directory.environment.read_text(encoding="utf-8")) if directory.environment.is_file() else {}
    return ComparedRun(
        name=name,
        path=path.resolve(),
        records=read_run(path),
        settings=read_settings(path),
        config=_read_config(directory.config),
        facts=facts,
        state=str(status["state"]) if status else "unknown",
    )


def _read_config(path: Path) -> Config | None:
    try:
        return load_config(path) if path.is_file() else None
    except ValueError:
        return None


def read_settings(run: Path) -> dict[str, str]:
    """Every key of a run's configuration as the text in the file, dotted."""
    path = RunDirectory(run).config
    flat: dict[str, str] = {}

    def visit(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = str(value)

    # BaseLoader builds strings, lists and dicts only: this is for showing, not for typing.
    visit("", yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {} if path.is_file() else {})
    return flat
