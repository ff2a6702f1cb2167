"""What autograd keeps of one linear layer until its backward pass, by hooks on saved tensors.

`activations` grows with the tokens; `weights` are copies of the weight made for one call (the weight itself and the
ternary codes that all calls share are not counted).  Tensors that are saved and freed again before the end of the
forward pass do not count.
"""

# ruff: noqa: E741 - O is a dimension
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.bench.kernels.case import Options, Outcome, Section
from pipeline.bench.kernels.drawing import COLORS, panels, save, unique
from pipeline.bench.kernels.layer import SHAPES, TOKENS, Layer, LayerCase
from pipeline.bench.results import Row, markdown_table

COLUMNS = ("case", "variant", "activation_bytes_per_token", "weight_copy_bytes")


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(layer: Layer, x: Tensor) -> tuple[int, int]:
    """Bytes of saved tensors with as many rows as `x`, and of others; each storage counts once.

    Storages that two calls share belong to neither (weights, cached codes), except that of `x`.
    """
    first, outputs_of_first = _saved(layer, x)
    second, outputs_of_second = _saved(layer, x)
    mine = x.untyped_storage().data_ptr()
    sizes = {key: size for key, size in second.items() if key == mine or key not in first}
    del outputs_of_first, outputs_of_second  # kept alive until here, and with them what was saved
    totals = [sum(size for by_token, size in sizes.values() if by_token is wanted) for wanted in (True, False)]
    return totals[0], totals[1]


def _saved(layer: Layer, x: Tensor) -> tuple[dict[int, tuple[bool, int]], Tensor]:
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Held:
        one = _Held(tensor.detach())  # with its history, a saved result would keep the graph alive that saved it
        held.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        y = layer(x)
    tensors = [one.tensor for one in held]
    sizes = [(t.shape[:1] == x.shape[:1], t.untyped_storage().nbytes()) for t in tensors]
    return {t.untyped_storage().data_ptr(): size for t, size in zip(tensors, sizes, strict=True)}, y


def measure(options: Options, wanted: str) -> Outcome:
    """A row per shape and variant."""
    rows: list[dict[str, object]] = []
    for D, O in SHAPES[:1] if options.quick else SHAPES:
        name = f"{D} -> {O}"
        if wanted in name:
            rows += _of_shape(name, LayerCase(D, O, TOKENS, options.device))
    return Outcome(rows, [])


def _of_shape(name: str, case: LayerCase) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for variant, layer in case.layers().items():
        activations, copies = saved_bytes(layer, case.x)
        per_token = f"{activations / len(case.x):.1f}"
        rows.append({"case": name, "variant": variant, COLUMNS[2]: per_token, COLUMNS[3]: copies})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Bytes per token and, in parentheses, MiB of copies of the weight."""
    variants = unique(rows, "variant")
    cells = {
        (row["case"], row["variant"]): f"{float(row[COLUMNS[2]]):.0f} ({int(row[COLUMNS[3]]) / 2**20:.0f} MiB)"
        for row in rows
    }
    lines = [[case, *(cells[case, variant] for variant in variants)] for case in unique(rows, "case")]
    return markdown_table(["bytes per token (copies of the weight)", *variants], lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bytes per token."""
    figure, (panel,) = panels(1)
    cases, variants = unique(rows, "case"), unique(rows, "variant")
    width = 0.85 / len(variants)
    for number, variant in enumerate(variants):
        heights = [float(row[COLUMNS[2]]) for row in rows if row["variant"] == variant]
        places = [index + (number - (len(variants) - 1) / 2) * width for index in range(len(cases))]
        panel.bar(places, heights, width, label=variant, color=COLORS[number])
    panel.set_xticks(range(len(cases)), cases)
    panel.set(title="saved for the backward pass", ylabel="bytes per token")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=7)
    save(figure, path)


SECTION = Section(
    "Saved by one linear layer for its backward pass",
    draw=draw,
    table=table,
    columns=COLUMNS,
    measure=measure,
)
