"""A plan as text, as JSON and as a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.results import markdown_table
from pipeline.config import Config
from pipeline.plan.memory import CATEGORIES as MEMORY
from pipeline.plan.memory import GIB
from pipeline.plan.model_costs import activated_parameters, model_layers, total_parameters
from pipeline.plan.search import ASSUMED_VOCABULARY, Cluster, Estimate, Plan, overrides
from pipeline.plan.step_time import CATEGORIES as TIME

_HEAD = ("layout", "TP", "PP", "VPP", "EP", "DP", "micro-batch", "recompute", "GiB", "ms/step", "tokens/s/GPU", "MFU")


def text(plan: Plan, config: Config, original: Config, cluster: Cluster) -> str:
    """Everything that `qsparse plan` prints.

    Args:
        plan: the answer.
        config: what was searched.
        original: what the files and overrides say.
        cluster: the GPUs.
    """
    blocks = [_title(config, original, cluster), *_configured(plan, cluster)]
    if plan.best:
        blocks += [f"Fastest of {plan.count} layouts that fit:", _layouts(plan.best)]
    else:
        blocks.append(f"None of {plan.count} layouts fits.")
    if plan.too_large:
        blocks += ["Do not fit:" if plan.best else "The smallest:", _too_large(plan.too_large)]
    if plan.best:
        blocks += [_categories("GiB", plan.best, MEMORY, "memory", 1 / GIB, 1)]
        blocks += [_categories("ms", plan.best, TIME, "time", 1e3, 1)]
        blocks += ["A GPU of layout 1 sends per step:", traffic_table(plan.best[0])]
        blocks += ["Overrides of layout 1:", "  " + " ".join(overrides(config, plan.best[0].config))]
    return "\n\n".join(blocks)


def as_json(plan: Plan, config: Config) -> dict[str, Any]:
    """The same in numbers: bytes and seconds."""
    configured = plan.configured if isinstance(plan.configured, str) else _numbers(plan.configured, config)
    lists = {"best": plan.best, "too_large": plan.too_large}
    return {"configured": configured} | {
        name: [_numbers(item, config) for item in some] for name, some in lists.items()
    }


def draw(estimates: Sequence[Estimate], path: Path, *, as_shares: bool = False) -> None:
    """Memory and step time by category, a bar per layout; times as shares of the step for steps of different sizes."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(12, 1.6 + 0.5 * len(estimates)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    memory = [[item.memory[name] / GIB for item in estimates] for name in MEMORY]
    scales = [100 / item.seconds if as_shares else 1e3 for item in estimates]
    time = [[item.time[name] * scale for item, scale in zip(estimates, scales, strict=True)] for name in TIME]
    panels = ((left, MEMORY, memory, "memory [GiB]"), (right, TIME, time, f"time [{'%' if as_shares else 'ms'}]"))
    for axes, names, rows, unit in panels:
        start = [0.0] * len(estimates)
        for index, (name, values) in enumerate(zip(names, rows, strict=True)):
            axes.barh(range(len(estimates)), values, left=start, label=name, color=f"C{index}")
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.set_xlabel(unit)
        axes.set_yticks(range(len(estimates)), [_short(item) for item in estimates])
        axes.legend(fontsize="x-small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    left.invert_yaxis()
    os.makedirs(path.parent, exist_ok=True)
    figure.savefig(path, dpi=110)


def layout_row(item: Estimate) -> list[str]:
    """A layout's sizes and results, in the order of the table's head."""
    at, training = item.layout, item.config.training
    sizes = (at.tp, at.pp, at.vpp, at.ep, at.dp, training.micro_batch_size, training.recompute)
    results = (f"{item.gib:.1f}", f"{item.seconds * 1e3:.0f}", f"{item.tokens_per_second:,.0f}", f"{item.mfu:.1%}")
    return [*map(str, sizes), *results]


def traffic_table(item: Estimate) -> str:
    """Bytes by kind, as the code sends them and otherwise."""
    rows = [[t.kind, *(f"{n / 1e6:,.1f}" for n in (t.sent, t.in_bf16, t.with_2bit))] for t in item.traffic]
    totals = (sum(getattr(t, name) for t in item.traffic) / 1e6 for name in ("sent", "in_bf16", "with_2bit"))
    rows.append(["all", *(f"{total:,.1f}" for total in totals)])
    return markdown_table(("MB per GPU and step", "sent", "all activations in bf16", "with ternary_param_gather"), rows)


def _title(config: Config, original: Config, cluster: Cluster) -> str:
    layers, training = model_layers(config), config.training
    visited = sum(linear.size * visits for kind in layers.order for linear, visits in layers.kinds[kind].linears)
    sizes = {
        "parameters": total_parameters(config),
        "in projections that a token visits": visited,
        "of these activated": activated_parameters(config),
    }
    counts = ", ".join(f"{size / 1e9:.3g} B {name}" for name, size in sizes.items())
    vocabulary = f"; model.vocab_size={ASSUMED_VOCABULARY} assumed" if original.model.vocab_size is None else ""
    machine = f"{cluster.gpus} x {cluster.gpu}, {cluster.memory_gib:g} GiB, nodes of {cluster.per_node}"
    batch = f"{training.global_batch_size} sequences of {training.seq_length} tokens per step"
    return f"{config.run.name}: {counts}{vocabulary}\n{machine}; {batch}"


def _configured(plan: Plan, cluster: Cluster) -> list[str]:
    if isinstance(plan.configured, str):
        return [f"The layout of the configuration is impossible: {plan.configured}"]
    fits = "fits" if plan.configured.gib <= cluster.memory_gib else f"does not fit ({_largest(plan.configured)})"
    return [
        f"The layout of the configuration {fits}:",
        markdown_table(_HEAD, [["as given", *layout_row(plan.configured)]]),
    ]


def _layouts(estimates: Sequence[Estimate]) -> str:
    return markdown_table(_HEAD, [[str(number), *layout_row(item)] for number, item in enumerate(estimates, 1)])


def _too_large(estimates: Sequence[Estimate]) -> str:
    head = (*_HEAD, "largest")
    return markdown_table(head, [[chr(97 + n), *layout_row(item), _largest(item)] for n, item in enumerate(estimates)])


def _largest(item: Estimate) -> str:
    name = max(item.memory, key=lambda name: item.memory[name])
    return f"{name} {item.memory[name] / GIB:.1f} GiB"


def _categories(
    unit: str, estimates: Sequence[Estimate], names: Sequence[str], kind: str, scale: float, digits: int
) -> str:
    rows = [[name, *(f"{getattr(item, kind)[name] * scale:.{digits}f}" for item in estimates)] for name in names]
    shown = [row for row in rows if any(float(value) for value in row[1:])]
    return markdown_table((unit, *(str(number) for number, _ in enumerate(estimates, 1))), shown)


def _short(item: Estimate) -> str:
    at = item.layout
    sizes = {"TP": at.tp, "PP": at.pp, "EP": at.ep, "DP": at.dp, "mb": item.config.training.micro_batch_size}
    names = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "DP")
    return f"{item.config.run.name}: {names}"


def _numbers(item: Estimate, config: Config) -> dict[str, Any]:
    return {
        "overrides": overrides(config, item.config),
        "tokens_per_second_per_gpu": item.tokens_per_second,
        "mfu": item.mfu,
        "memory": item.memory,
        "seconds": item.time,
        "sent": {traffic.kind: traffic.sent for traffic in item.traffic},
    }
