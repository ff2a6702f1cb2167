"""Tables and figures of `qsparse bench train`, from its CSV files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.kernels.drawing import COLORS, panels, save, unique
from pipeline.bench.results import Row, markdown_table

KEYS = ("shape", "variant", "micro_batch")
"""Columns that say what was measured, in every CSV file."""
SHEETS = {
    "train": (
        *(*KEYS, "microbatches", "cuda_graph", "tokens_per_s_per_gpu"),
        *("ms_per_step", "q25_ms", "q75_ms", "peak_gib", "mfu", "loss", "absent"),
    ),
    "train_breakdown": (*KEYS, "category", "ms"),
    "train_memory": (*KEYS, "category", "gib"),
    "train_kernels": (*KEYS, "name", "category", "calls", "ms"),
}
"""CSV files and their columns."""
PROFILED = ("dense", "qsparse-bitnet", "qsparse-bitnet-fast")
"""Variants whose longest kernels are on the page, of the last shape."""
KERNELS_SHOWN = 12
BASELINES = ("dense", "te-bf16")
"""What ratios compare with: the faster of the two."""


def table(rows: Sequence[Row]) -> str:
    """A line per shape and variant."""
    header = ["shape", "variant", "tokens/s/GPU", "against dense", "ms/step (quartiles)", "peak GiB", "MFU", "loss"]
    header += ["micro-batch", "CUDA graph"]
    lines = []
    for row in best(rows):
        name = [row["shape"], row["variant"]]
        if row["absent"]:
            lines.append([*name, row["absent"], *[""] * 7])
            continue
        mfu = f"{float(row['mfu']):.1%}" if row["mfu"] else ""
        time = f"{row['ms_per_step']} ({row['q25_ms']} to {row['q75_ms']})"
        rate = f"{_rate(row):,.0f}"
        line = [*name, rate, _against_dense(row, rows), time, row["peak_gib"], mfu, row["loss"]]
        lines.append([*line, row["micro_batch"], row["cuda_graph"]])
    return markdown_table(header, lines)


def best(rows: Sequence[Row]) -> list[Row]:
    """Of each shape and variant the row of the micro-batch that was fastest."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["shape"], row["variant"])
        if key not in found or _rate(row) > _rate(found[key]):
            found[key] = row
    return list(found.values())


def _rate(row: Row) -> float:
    return float(row["tokens_per_s_per_gpu"] or 0)


def _against_dense(row: Row, rows: Sequence[Row]) -> str:
    """Ratio of tokens per second to the fastest dense bf16 model of the same shape; empty without one."""
    dense = [_rate(one) for one in rows if one["shape"] == row["shape"] and one["variant"] in BASELINES]
    return f"{_rate(row) / max(dense):.3f}" if any(dense) else ""


def batch_table(rows: Sequence[Row]) -> str:
    """A line per shape and variant, a column per micro-batch: tokens per second and peak GiB, against `dense`."""
    batches = sorted(unique(rows, "micro_batch"), key=int)
    found = {(row["shape"], row["variant"], row["micro_batch"]): row for row in rows if not row["absent"]}
    lines = []
    for shape, variant in dict.fromkeys((row["shape"], row["variant"]) for row in rows):
        cells = []
        for batch in batches:
            row, dense = found.get((shape, variant, batch)), found.get((shape, "dense", batch))
            cells.append("" if row is None else _rate_and_memory(row, dense))
        lines.append([shape, variant, *cells])
    return markdown_table(["shape", "variant", *(f"micro-batch {batch}" for batch in batches)], lines)


def _rate_and_memory(row: Row, dense: Row | None) -> str:
    rate, gib = _rate(row), float(row["peak_gib"])
    if dense is None:
        return f"{rate:,.0f}, {gib} GiB"
    return f"{rate:,.0f} ({rate / _rate(dense):.2f}x), {gib} GiB ({gib / float(dense['peak_gib']) - 1:+.0%})"


def _belonging_to(rows: Sequence[Row], parts: Sequence[Row]) -> list[Row]:
    wanted = {tuple(row[key] for key in KEYS) for row in rows}
    return [part for part in parts if tuple(part[key] for key in KEYS) in wanted]


def _of_best(rows: Sequence[Row], parts: Sequence[Row]) -> list[Row]:
    """Those of `parts` that belong to the best rows."""
    return _belonging_to(best(rows), parts)


def _at_equal_batch(rows: Sequence[Row], parts: Sequence[Row]) -> list[Row]:
    """Those of `parts` at the largest micro-batch that every measured variant of their shape has; else of the best."""
    rows = [row for row in rows if not row["absent"]]
    found = []
    for shape in unique(rows, "shape"):
        here = [row for row in rows if row["shape"] == shape]
        batches = [{row["micro_batch"] for row in here if row["variant"] == name} for name in unique(here, "variant")]
        if common := set.intersection(*batches):
            here = [row for row in here if row["micro_batch"] == max(common, key=int)]
        found += _belonging_to(best(here), parts)
    return found


def breakdown_table(rows: Sequence[Row], breakdown: Sequence[Row]) -> str:
    """Milliseconds of a step: a line per shape and variant, a column per category."""
    return _category_table(_of_best(rows, breakdown), "ms", 1)


def memory_table(rows: Sequence[Row], memory: Sequence[Row]) -> str:
    """GiB at the peak, at the same micro-batch: a line per shape and variant, a column per category."""
    return _category_table(_at_equal_batch(rows, memory), "gib", 2)


def _category_table(parts: Sequence[Row], unit: str, digits: int) -> str:
    categories = unique(parts, "category")
    lines = []
    for shape in unique(parts, "shape"):
        here = [part for part in parts if part["shape"] == shape]
        for variant in unique(here, "variant"):
            found = {part["category"]: float(part[unit]) for part in here if part["variant"] == variant}
            cells = (f"{found[name]:.{digits}f}" if name in found else "" for name in categories)
            lines.append([shape, variant, *cells, f"{sum(found.values()):.{digits}f}"])
    return markdown_table(["shape", "variant", *categories, "sum"], lines)


def kernel_table(rows: Sequence[Row], kernels: Sequence[Row]) -> str:
    """The longest kernels of some variants of the last shape, each with its share of the step."""
    shown = _of_best(rows, kernels)
    last = unique(shown, "shape")[-1:]
    lines = []
    for variant in PROFILED:
        here = [one for one in shown if one["variant"] == variant and one["shape"] in last]
        for one in here[:KERNELS_SHOWN]:
            lines.append([one["shape"], variant, f"`{one['name'][:60]}`", one["category"], one["calls"], one["ms"]])
    return markdown_table(["shape", "variant", "kernel", "category", "calls", "ms"], lines)


def draw(sheets: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Tokens per second, where the time of a step goes, and where its memory, of each shape."""
    rows = sheets["train"]
    shapes = unique(rows, "shape")
    figure, axes = panels(4 * len(shapes), width=7.0)
    for number, shape in enumerate(shapes):
        here = [row for row in best(rows) if row["shape"] == shape and not row["absent"]]
        names = [row["variant"] for row in here]
        four = axes[4 * number : 4 * number + 4]
        _rates(four[0], here, shape)
        breakdown = [row for row in _of_best(rows, sheets["train_breakdown"]) if row["shape"] == shape]
        per_token = {row["variant"]: 1e6 * float(row["ms_per_step"]) / _tokens(row) for row in here}
        _stacks(four[1], _per_token(breakdown, here), names, f"{shape}: GPU time per token, ns")
        four[1].plot([per_token[name] for name in names], names, "k|", markersize=12, label="whole step")
        four[1].legend(frameon=False, fontsize=6)
        memory = [row for row in _at_equal_batch(rows, sheets["train_memory"]) if row["shape"] == shape]
        batches = "/".join(unique(memory, "micro_batch"))
        title = f"{shape}: GiB at the peak, micro-batch {batches}"
        _stacks(four[2], [{**row, "amount": row["gib"]} for row in memory], names, title)
        four[3].set_axis_off()
        for panel in four[:3]:
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _tokens(row: Row) -> float:
    """Tokens of a step."""
    return _rate(row) * float(row["ms_per_step"]) / 1e3


def _per_token(breakdown: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    tokens = {row["variant"]: _tokens(row) for row in rows}
    return [
        {**part, "amount": str(1e6 * float(part["ms"]) / tokens[part["variant"]])}
        for part in breakdown
        if part["variant"] in tokens
    ]


def _rates(panel: Any, rows: Sequence[Row], shape: str) -> None:
    names, rates = [row["variant"] for row in rows], [_rate(row) for row in rows]
    bars = panel.barh(names, rates, color=COLORS[0])
    labels = [f"{rate:,.0f}; micro-batch {row['micro_batch']}" for rate, row in zip(rates, rows, strict=True)]
    panel.bar_label(bars, labels, fontsize=7)
    panel.set(title=f"{shape}: tokens/s", xlim=(0, 1.35 * max(rates, default=1.0)))


def _stacks(panel: Any, parts: Sequence[Row], variants: list[str], title: str) -> None:
    """A bar per variant of `amount` by category."""
    left = dict.fromkeys(variants, 0.0)
    for number, category in enumerate(unique(parts, "category")):
        amounts = {part["variant"]: float(part["amount"]) for part in parts if part["category"] == category}
        widths = [amounts.get(variant, 0.0) for variant in variants]
        color = COLORS[number % len(COLORS)]
        panel.barh(variants, widths, left=[left[v] for v in variants], label=category, color=color)
        for variant, width in zip(variants, widths, strict=True):
            left[variant] += width
    panel.set(title=title)
    panel.legend(frameon=False, fontsize=6)
