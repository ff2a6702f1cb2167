"""Where each run got, and what differs between them, as tables.

Losses are compared at equal tokens: at the largest number of tokens that every run has trained on.  A training loss
there is the mean over the tenth of tokens before it, because single batches are noisy; a held-out loss is that of the
last evaluation until then.  Where the runs ended, and their best, stands beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.compare.runs import ComparedRun, Curve

LOSSES = ("val/loss", "train/loss")
WINDOW = 0.1
_UNINTERESTING = ("run.name", "run.root", "tracking.parent", "tracking.experiment", "tracking.uri")


@dataclass(frozen=True)
class RunSummary:
    """Numbers of one run; None where it has not logged them.

    Attributes:
        train_loss: at equal tokens, nats per token.
        val_loss: at equal tokens.
        tokens_per_second: median over the records; per device: over the ranks.
        data_wait: share of the step time.
        peak_bytes: largest.
    """

    name: str
    state: str
    steps: int
    tokens: float
    train_loss: float | None
    val_loss: float | None
    final_train_loss: float | None
    final_val_loss: float | None
    best_val_loss: float | None
    best_val_tokens: float | None
    activated_parameters: float | None
    sparsity: float | None
    ternary_zeros: float | None
    tokens_per_second: float | None
    tokens_per_second_per_device: float | None
    step_seconds: float | None
    data_wait: float | None
    peak_bytes: float | None

    def as_json(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, the first column a heading."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def check_comparable(runs: Sequence[ComparedRun]) -> None:
    """Raise unless there are at least two runs and a loss over tokens that all of them have.

    Raises:
        ValueError: they cannot be compared; the message says what each has.
    """
    if len(runs) < 2:
        found = runs[0].name if runs else "none"
        raise ValueError(f"a comparison takes two runs or more, found {found}; `qsparse report` draws one run")
    if any(all(len(run.curve(loss).tokens) for run in runs) for loss in LOSSES):
        return
    has = "; ".join(f"{run.name} has {_losses_of(run)}" for run in runs)
    raise ValueError(f"these runs cannot be compared, they have no loss over tokens in common: {has}")


def _losses_of(run: ComparedRun) -> str:
    names = [loss for loss in LOSSES if len(run.finite(loss))]
    without = "" if len(run.finite("train/tokens")) else " and no train/tokens"
    return (" and ".join(names) or "neither train/loss nor val/loss") + without


def equal_tokens(runs: Sequence[ComparedRun]) -> float:
    """The largest number of tokens that all runs have trained on."""
    return min(max(run.curve(loss).tokens[-1] for loss in LOSSES if len(run.curve(loss).tokens)) for run in runs)


def mean_before(curve: Curve, tokens: float) -> float | None:
    """Mean of the values within the last tenth of the tokens until `tokens`; at least the last value."""
    until = curve.tokens <= tokens
    if not until.any():
        return None
    values, places = curve.values[until], curve.tokens[until]
    return float(values[places >= min(places[-1], (1 - WINDOW) * tokens)].mean())


def last_before(curve: Curve, tokens: float) -> float | None:
    """The last value until `tokens`."""
    until = curve.tokens <= tokens
    return float(curve.values[until][-1]) if until.any() else None


def summarize(run: ComparedRun, tokens: float) -> RunSummary:
    """Numbers of one run, losses at `tokens`."""
    train, val = run.curve("train/loss"), run.curve("val/loss")
    best = int(np.argmin(val.values)) if len(val.values) else None
    speed = _median(run, "perf/tokens_per_second")
    devices = int(run.facts.get("world_size", 0))
    step_seconds, wait = _median(run, "perf/step_seconds"), _median(run, "perf/data_wait_seconds")
    return RunSummary(
        name=run.name,
        state=run.state,
        steps=max(record["step"] for record in run.records),
        tokens=run.last("train/tokens") or 0.0,
        train_loss=mean_before(train, tokens),
        val_loss=last_before(val, tokens),
        final_train_loss=mean_before(train, math.inf if not len(train.tokens) else train.tokens[-1]),
        final_val_loss=run.last("val/loss"),
        best_val_loss=None if best is None else float(val.values[best]),
        best_val_tokens=None if best is None else float(val.tokens[best]),
        activated_parameters=run.last("qsparse/activated_parameters"),
        sparsity=run.last("qsparse/sparsity"),
        ternary_zeros=run.last("qsparse/ternary_zeros"),
        tokens_per_second=speed,
        tokens_per_second_per_device=speed / devices if speed and devices else None,
        step_seconds=step_seconds,
        data_wait=wait / step_seconds if step_seconds and wait is not None else None,
        peak_bytes=float(run.finite("mem/peak_bytes").max()) if len(run.finite("mem/peak_bytes")) else None,
    )


def _median(run: ComparedRun, metric: str) -> float | None:
    values = run.finite(metric)
    return float(np.median(values)) if len(values) else None


def results_table(summaries: Sequence[RunSummary], tokens: float) -> Table:
    """Losses, one row per run."""
    at = f"at {count(tokens)} tokens"
    columns = (
        *("run", "state", "steps", "tokens", f"val loss {at}", f"perplexity {at}", f"train loss {at}"),
        *("final val loss", "final train loss", "best val loss", "at tokens"),
    )
    rows = [
        (
            *(s.name, s.state, f"{s.steps:,}", count(s.tokens)),
            *(_show(s.val_loss, ".4f"), _show(s.val_loss and math.exp(s.val_loss), ".2f"), _show(s.train_loss, ".4f")),
            *(_show(s.final_val_loss, ".4f"), _show(s.final_train_loss, ".4f")),
            *(_show(s.best_val_loss, ".4f"), _show(s.best_val_tokens, count)),
        )
        for s in summaries
    ]
    return Table(columns, tuple(rows))


def cost_table(summaries: Sequence[RunSummary]) -> Table:
    """Activated parameters, speed and memory, one row per run."""
    columns = (
        *("run", "activated parameters", "sparsity", "ternary zeros", "tokens/s", "tokens/s per device"),
        *("step", "waiting for data", "peak memory"),
    )
    rows = [
        (
            *(s.name, _show(s.activated_parameters, count), _show(s.sparsity, ".1%"), _show(s.ternary_zeros, ".1%")),
            *(_show(s.tokens_per_second, ",.0f"), _show(s.tokens_per_second_per_device, ",.0f")),
            *(_show(s.step_seconds, lambda seconds: f"{seconds:.3g} s"), _show(s.data_wait, ".1%")),
            _show(s.peak_bytes, lambda size: f"{size / 2**30:.2f} GiB"),
        )
        for s in summaries
    ]
    return Table(columns, tuple(rows))


def differences(runs: Sequence[ComparedRun]) -> Table:
    """Configuration keys, and facts of machine and software, in which the runs differ; no rows if in none."""
    facts = ("device", "world_size", "vocab_size", "commit", "torch", "megatron-core", "triton")
    rows = []
    for key in sorted({key for run in runs for key in run.settings} - set(_UNINTERESTING)):
        rows.append((key, *(run.settings.get(key, "-") for run in runs)))
    rows += [(name, *(str(run.facts.get(name, "-")) for run in runs)) for name in facts]
    return Table(("key", *(run.name for run in runs)), tuple(row for row in rows if len(set(row[1:])) > 1))


def cautions(runs: Sequence[ComparedRun]) -> list[str]:
    """What makes the losses less comparable than they look."""
    found = []
    if len({run.facts.get("vocab_size") for run in runs if "vocab_size" in run.facts}) > 1:
        found.append("The tokenizers differ in size: a loss per token of one is not that of another.")
    if len({(run.settings.get("data.path"), run.settings.get("data.sources")) for run in runs}) > 1:
        found.append("The runs read different data, so their held-out losses are of different texts.")
    if unloadable := [run.name for run in runs if run.config is None]:
        found.append(f"Without a configuration that loads: {', '.join(unloadable)}; their operations are not counted.")
    if unfinished := [f"{run.name} ({run.state})" for run in runs if run.state not in ("completed", "unknown")]:
        found.append(f"Not completed: {', '.join(unfinished)}.")
    return found


def count(number: float) -> str:
    """`983.0k`, `1.36M`, `2.10B`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _show(value: float | None, form: str | Callable[[float], str]) -> str:
    if value is None:
        return "-"
    return format(value, form) if isinstance(form, str) else form(value)
