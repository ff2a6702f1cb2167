"""Block-sparse products against dense products of the same number of multiplications.

Two patterns: the block-diagonal one of a mixture's hidden layer, and random tiles at 50%.  The yardsticks are dense
cuBLAS products of equal operations and equal tiles per output: `batched`, one product per expert of the same rows and
features (a mixture with perfectly balanced experts, what MegaBlocks compares with, arXiv 2211.15841 sec. 6.3), and
`dense`, one product whose rows (or summed features) are reduced to the share of nonzero tiles.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import block_sparse, reference
from kernels.grouped_reference import dense_from_tiles, tiles_from_dense
from kernels.tile_launch import TileConfig
from kernels.topology import Topology, expert_topology, from_mask
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch, relative_error
from pipeline.bench.kernels.drawing import ratio_bars, ratio_table, speedup
from pipeline.bench.kernels.timing import Call, Rates

BLOCK = 128


class Pattern(NamedTuple):
    """A sparse [rows, columns] hidden layer with D features on the other side of either product."""

    rows: int
    columns: int
    D: int
    experts: int
    density: float


PATTERNS = {
    "8 experts": Pattern(16384, 8 * 4096, 2048, 8, 1 / 8),
    "64 experts": Pattern(16384, 64 * 1024, 2048, 64, 1 / 64),
    "random half": Pattern(8192, 8192, 4096, 0, 0.5),
}


def make_topology(pattern: Pattern, device: str) -> Topology:
    """Balanced experts, or random tiles at exactly the given density in each row of blocks."""
    block = (BLOCK, BLOCK)
    if pattern.experts:
        offsets = torch.arange(pattern.experts + 1, device=device) * (pattern.rows // pattern.experts)
        features = pattern.columns // pattern.experts
        return expert_topology(offsets.to(torch.int32), pattern.rows // BLOCK, features, block)
    grid = pattern.rows // BLOCK, pattern.columns // BLOCK
    order = torch.rand(grid, device=device).argsort(1)
    mask = torch.zeros(grid, dtype=torch.bool, device=device)
    mask.scatter_(1, order[:, : int(pattern.density * grid[1])], True)
    return from_mask(mask, block)


class BlockSparseCase:
    """Values of one pattern.

    Args:
        pattern: sizes.
        device: where.
    """

    def __init__(self, pattern: Pattern, device: str) -> None:
        torch.manual_seed(0)
        self._pattern, self._device = pattern, device
        self._topology = t = make_topology(pattern, device)
        rows, columns, D = pattern.rows, pattern.columns, pattern.D
        self._x = torch.randn(rows, D, device=device).bfloat16()
        self._up = torch.randn(columns, D, device=device).bfloat16()
        self._values = torch.randn(t.capacity, *t.block, device=device).bfloat16()
        self._x8 = torch.randint(-127, 128, (rows, D), device=device, dtype=torch.int8)
        self._up8 = torch.randint(-1, 2, (columns, D), device=device, dtype=torch.int8)
        self._values8 = torch.randint(-127, 128, (t.capacity, *t.block), device=device, dtype=torch.int8)
        self._down8 = self._up8.t().contiguous()
        self._row_scale, self._column_scale = torch.rand(rows, device=device), torch.rand(columns, device=device)
        self._feature_scale = torch.rand(D, device=device)

    def calls(self) -> dict[str, Callable[..., Tensor]]:
        """Our products; each takes a `config`."""
        o, t = self, self._topology
        scales: dict[str, Any] = {"a_scale_M": o._row_scale, "b_scale_N": o._column_scale}
        down_scales: dict[str, Any] = {"row_scale_M": o._row_scale, "column_scale_N": o._feature_scale}
        return {
            "sdd bf16": partial(block_sparse.sdd, o._x, o._up, t, b_layout="nk"),
            "dsd bf16": partial(block_sparse.dsd, o._values, o._up, t),
            "dsd S^T bf16": partial(block_sparse.dsd, o._values, o._x, t, form="S^T"),
            "sdd int8": partial(block_sparse.sdd, o._x8, o._up8, t, b_layout="nk", **scales),
            "dsd int8": partial(block_sparse.dsd, o._values8, o._down8, t, b_layout="nk", **down_scales),
        }

    def _wanted(self) -> Iterator[tuple[str, Tensor, float]]:
        """Dense products of the same values, and the largest relative error; 0 means bit for bit."""
        t = self._topology

        def tiles(dense: Tensor) -> Tensor:
            return tiles_from_dense(dense, t.rows, t.columns, t.block)

        def dense(values: Tensor) -> Tensor:
            return dense_from_tiles(values, t.rows, t.columns, t.block, t.grid)

        def exact(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
            scales: dict[str, Any] = {"x_scale_T1": self._row_scale[:, None], "weight_scale_O": weight_scale}
            return reference.linear(x, weight, **scales, dtype=torch.bfloat16)

        yield "sdd bf16", tiles(self._x.float() @ self._up.float().t()), 2**-8
        yield "dsd bf16", dense(self._values).float() @ self._up.float(), 2**-8
        yield "dsd S^T bf16", dense(self._values).float().t() @ self._x.float(), 2**-8
        yield "sdd int8", tiles(exact(self._x8, self._up8, self._column_scale)), 0.0
        yield "dsd int8", exact(dense(self._values8), self._down8, self._feature_scale), 0.0

    def checks(self) -> Iterator[Check]:
        """Every product against the dense one."""
        calls = self.calls()
        for name, want, bound in self._wanted():
            got = calls[name]()
            error = relative_error(got.flatten(1), want.flatten(1)) if bound else mismatch(got, want)
            yield Check(name, error, bound)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """One per product."""
        operations = 2 * self._topology.capacity * BLOCK * BLOCK * self._pattern.D
        for name, call in self.calls().items():
            floor = operations / rates.operations_per_us[name.rsplit(" ", 1)[1]]
            rivals = self._dense(name)
            floors = dict.fromkeys(("ours", *rivals), floor)
            yield Contest(name, {"ours": call}, rivals=rivals, baseline="dense", floors=floors)

    def _dense(self, name: str) -> dict[str, Call]:
        """cuBLAS products of equal operations."""
        p, device = self._pattern, self._device
        product, kind = name.rsplit(" ", 1)
        rows, columns, summed = _equal_dense(p, product)
        if kind == "int8":
            a8 = torch.randint(-127, 128, (rows, summed), dtype=torch.int8, device=device)
            b8 = torch.randint(-1, 2, (columns, summed), dtype=torch.int8, device=device)
            return {"dense": lambda: torch._int_mm(a8, b8.t())}
        a, b = (torch.randn(size, summed, device=device).bfloat16() for size in (rows, columns))
        found: dict[str, Call] = {"dense": lambda: a @ b.t()}
        if p.experts:
            tokens, features = p.rows // p.experts, p.columns // p.experts
            sizes = {"sdd": (tokens, features, p.D), "dsd": (tokens, p.D, features), "dsd S^T": (features, p.D, tokens)}
            m, n, k = sizes[product]
            ae, be = (torch.randn(p.experts, size, k, device=device).bfloat16() for size in (m, n))
            found["batched"] = lambda: torch.bmm(ae, be.transpose(1, 2))
        return found

    def launches(self) -> Iterator[Contest]:
        """Tile shapes."""
        for name, call in self.calls().items():
            k = 128 if name.endswith("int8") else 64
            shapes = [(256, k, 8, 5, 1), (256, k, 8, 7, 1), (128, k, 4, 5, 1), (128, k, 4, 7, 1), (128, k, 8, 7, 1)]
            if name.startswith("sdd"):
                shapes = [(128, k, 4, 3, 2), (128, k, 4, 4, 1), (128, k, 8, 4, 1), (128, k, 8, 3, 2)]
            tiles = [
                TileConfig(128, n, block_k, num_warps=warps, num_stages=stages, programs_per_sm=programs)
                for n, block_k, warps, stages, programs in shapes
            ]
            yield Contest(name, {str(tile): partial(call, config=tile) for tile in tiles})


def _equal_dense(pattern: Pattern, product: str) -> tuple[int, int, int]:
    """(M, N, K) of a dense product with as many multiplications: the sparse side's other dimension shrinks."""
    share = int(pattern.columns * pattern.density)
    if product == "sdd":
        return pattern.rows, share, pattern.D
    if product == "dsd":
        return pattern.rows, pattern.D, share
    return share, pattern.D, pattern.rows


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    names = list(PATTERNS)[:1] if options.quick else list(PATTERNS)
    return {name: partial(BlockSparseCase, PATTERNS[name], options.device) for name in names}


SECTION = Section(
    "Block-sparse products (speed-up over a dense product of as many operations)",
    cases=_cases,
    draw=ratio_bars(speedup, "speed-up over dense"),
    table=ratio_table(speedup, "x"),
)
