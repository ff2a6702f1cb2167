"""Products of one to sixteen tokens against dense bf16 and against the bytes that have to travel; the break-even map.

Each call reads the next of several copies of the weight, 256 MB together, so that no weight is found in the
second-level cache.  The floor is what the unavoidable bytes take at the speed of a copy measured in the same run: the
weights of the union of the tokens' nonzero features (all weights, for products that skip nothing).
"""

# ruff: noqa: E741 - O is a dimension
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import decode, reference
from kernels.launch import multiprocessors
from kernels.packing import PackedTernary, pack_ternary
from pipeline.bench.kernels.case import Check, Contest, Options, Section, mismatch
from pipeline.bench.kernels.drawing import panels, ratio_table, save, speedup, unique
from pipeline.bench.kernels.timing import Call, Rates
from pipeline.bench.results import Row

SHAPES = ((14336, 4096), (4096, 14336))
TOKENS = (1, 2, 4, 8, 16)
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.8, 0.9)
ROTATION_BYTES = 256 * 2**20
DENSE = "dense bf16"
TERNARY = ("ternary gemv", "ternary dot")
FLOAT = "bf16 gemv"


class DecodeCase:
    """T tokens times a weight [O, D], at several sparsities.

    Args:
        D: input features.
        O: output features.
        T: tokens.
        device: where.
        sparsities: shares of zero activations.
        rotation_bytes: size of all copies of a weight together.
        gemv: our product of codes.
    """

    def __init__(
        self,
        D: int,
        O: int,
        T: int,
        device: str,
        *,
        sparsities: Sequence[float] = SPARSITIES,
        rotation_bytes: int = ROTATION_BYTES,
        gemv: Callable[..., Tensor] = decode.ternary_gemv,
    ) -> None:
        torch.manual_seed(0)
        self._sizes, self._gemv = (D, O, T), gemv
        self._ternary = torch.randint(-1, 2, (O, D), dtype=torch.int8, device=device)
        self._column, self._row = (
            _packed_copies(pack_ternary(self._ternary, layout="column"), rotation_bytes),
            _packed_copies(pack_ternary(self._ternary, layout="row"), rotation_bytes),
        )
        dense = torch.randn(O, D, device=device).bfloat16()
        copies = max(1, -(-rotation_bytes // (2 * D * O)))
        self._dense = [dense.clone() for _ in range(copies)]
        self._dense_DO = [dense.t().contiguous() for _ in range(copies)]
        self._scales: dict[str, Any] = {
            "x_scale_T1": torch.rand(T, 1, device=device),
            "weight_scale_O": torch.rand(O, device=device),
        }
        self._codes = {sparsity: self._activations(sparsity, device) for sparsity in sparsities}
        self._workspace = decode.Workspace.allocate(device, num_sums=T * O, num_arrivals=T * 4096)

    def _activations(self, sparsity: float, device: str) -> Tensor:
        """Random codes without zeros, of which exactly K per token are kept."""
        D, _, T = self._sizes
        codes = torch.randint(1, 128, (T, D), dtype=torch.int8, device=device)
        codes *= torch.randint(0, 2, (T, D), dtype=torch.int8, device=device) * 2 - 1
        mask = reference.topk_mask(torch.rand(T, D, device=device), int((1 - sparsity) * D))
        return reference.apply_mask(codes, mask)

    def _calls(self, codes: Tensor, configs: Mapping[str, Any] | None = None) -> dict[str, list[Call]]:
        """For each of our products one call per copy of its weight."""
        floats, chosen = codes.bfloat16(), configs or {}
        gemv, dot, dense = (
            dict[str, Any](workspace=self._workspace, config=chosen.get(name)) for name in (*TERNARY, FLOAT)
        )
        return {
            "ternary gemv": [partial(self._gemv, codes, w, **self._scales, **gemv) for w in self._column],
            "ternary dot": [partial(decode.ternary_dot, codes, w, **self._scales, **dot) for w in self._row],
            FLOAT: [partial(decode.float_gemv, floats, w, **dense) for w in self._dense_DO],
        }

    def first_calls(self) -> list[Call]:
        """One of each product."""
        return [calls[0] for codes in self._codes.values() for calls in self._calls(codes).values()]

    def checks(self) -> Iterator[Check]:
        """Products of codes bit for bit; those of floats within n float32 additions and one rounding to bf16."""
        for sparsity, codes in self._codes.items():
            found: dict[str, Any] = {name: calls[0]() for name, calls in self._calls(codes).items()}
            want = reference.linear(codes, self._ternary, **self._scales, dtype=torch.bfloat16)
            for name in TERNARY:
                yield Check(f"{name}, {sparsity:.0%} zeros", mismatch(found[name], want), 0.0)
            x, weight = codes.double(), self._dense_DO[0].double()
            exact, magnitude = x @ weight, x.abs() @ weight.abs()
            bound = self._sizes[0] * 2**-23 * magnitude + 2**-8 * exact.abs()
            excess = ((found[FLOAT].double() - exact).abs() / bound.clamp(min=1e-30)).max()
            yield Check(f"{FLOAT}, {sparsity:.0%} zeros, error over its bound", float(excess), 1.0)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """One per sparsity."""
        D, O, _ = self._sizes
        for sparsity, codes in self._codes.items():
            floats = codes.bfloat16()
            needed = float((codes != 0).any(0).sum()) * O / rates.bytes_per_us
            yield Contest(
                f"{sparsity:.0%} zeros",
                {DENSE: [partial(linear, floats, w) for w in self._dense], **self._calls(codes)},
                baseline=DENSE,
                floors={
                    DENSE: 2 * D * O / rates.bytes_per_us,
                    "ternary gemv": needed / 4,
                    "ternary dot": D * O / 4 / rates.bytes_per_us,
                    FLOAT: 2 * needed,
                },
            )

    def launches(self) -> Iterator[Contest]:
        """Divisions of the work at half sparsity: programs per multiprocessor, warps, early starts."""
        D, O, T = self._sizes
        processors = multiprocessors(self._ternary.device)

        def gemv(shapes: Sequence[tuple[int, int]], outputs: int, rows: int, most_steps: int) -> list[Any]:
            tiles = T * -(-O // outputs)
            configs = [
                decode.GemvConfig.filling(programs * processors // tiles, rows, num_warps=warps, most_steps=most_steps)
                for programs, warps in shapes
            ]
            return [*configs, replace(configs[0], overlap=False)]

        dot = decode.DotConfig()
        candidates = {
            "ternary gemv": gemv(((2, 4), (4, 4), (2, 8)), 512, -(-D // 4), decode.TERNARY_STEPS),
            FLOAT: gemv(((4, 4), (8, 4), (16, 4)), 256, D, decode.FLOAT_STEPS),
            "ternary dot": [replace(dot, splits=splits) for splits in (2, 4, 8)] + [replace(dot, overlap=False)],
        }
        for name, configs in candidates.items():
            yield Contest(name, {str(one): self._calls(self._codes[0.5], {name: one})[name] for one in configs})


def _packed_copies(packed: PackedTernary, rotation_bytes: int) -> list[PackedTernary]:
    copies = max(1, -(-rotation_bytes // packed.num_bytes))
    return [replace(packed, words=packed.words.clone()) for _ in range(copies)]


def _cases(options: Options, **arguments: Any) -> Mapping[str, Callable[[], "DecodeCase"]]:
    tokens = TOKENS[:1] if options.quick else TOKENS
    return {
        f"{D} -> {O}, T={T}": partial(DecodeCase, D, O, T, options.device, **arguments)
        for D, O in SHAPES
        for T in tokens
    }


def _compile(options: Options, wanted: str) -> Iterable[Call]:
    """Every kernel of every number of tokens once: how the work is divided is compiled in."""
    for name, build in _cases(options, sparsities=(0.5,), rotation_bytes=1).items():
        if wanted in name:
            yield from build().first_calls()


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Break-even maps over sparsity and tokens: the faster ternary product, and sparse bf16, against dense bf16."""
    shapes = list(dict.fromkeys(row["case"].split(", ")[0] for row in rows))
    maps = {"2-bit weights": TERNARY, "bf16 weights": (FLOAT,)}
    figure, axes = panels(len(shapes) * len(maps), height=3.2)
    places = [(title, variants, shape) for title, variants in maps.items() for shape in shapes]
    for panel, (title, variants, shape) in zip(axes, places, strict=True):
        here = [row for row in rows if row["case"].startswith(f"{shape}, ") and row["variant"] in variants]
        image = _draw_map(panel, here)
        panel.set(xlabel="zero activations", ylabel="tokens", title=f"{title}, {shape}")
        bar = figure.colorbar(image, ax=panel, label="speed-up over dense bf16", ticks=_TICKS)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in _TICKS])
        bar.ax.minorticks_off()
    save(figure, path)


_TICKS = (0.25, 0.5, 1, 2, 4, 8, 16)


def _draw_map(panel: Any, rows: Sequence[Row]) -> Any:
    """One map, green where the fastest of the rows of a cell wins, with the line where it and dense are equal."""
    from matplotlib.colors import LogNorm

    cases, columns = unique(rows, "case"), unique(rows, "operation")
    grid = []
    for y, case in enumerate(cases):
        grid.append([float("nan")] * len(columns))
        for x, column in enumerate(columns):
            cell = [row for row in rows if (row["case"], row["operation"]) == (case, column)]
            if not cell:
                continue
            best = max(cell, key=lambda row: float(row["speedup"]))
            grid[y][x] = float(best["speedup"])
            label = f"{grid[y][x]:.2f}x" + (f"\n{best['variant'].removeprefix('ternary ')}" if len(cell) > 1 else "")
            panel.text(x, y, label, ha="center", va="center", fontsize=7)
    image = panel.imshow(grid, origin="lower", aspect="auto", cmap="RdYlGn", norm=LogNorm(1 / 16, 16))
    known = [value for line in grid for value in line if value == value]
    if min(len(cases), len(columns)) > 1 and min(known) < 1 < max(known):
        panel.contour(grid, levels=[1.0], colors="black", linewidths=1.5)
    panel.set_xticks(range(len(columns)), [column.removesuffix(" zeros") for column in columns])
    panel.set_yticks(range(len(cases)), [case.split("T=")[1] for case in cases])
    return image


SECTION = Section(
    "Decoding: a weight in memory times few tokens (speed-up over dense bf16)",
    cases=_cases,
    compile=_compile,
    draw=_draw,
    table=ratio_table(speedup, "x"),
)
