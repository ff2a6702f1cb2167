"""Block-sparse products against dense products of the same number of multiplications.

    python -m benchmarks.kernels_block_sparse --csv block_sparse.csv
    python -m benchmarks.kernels_block_sparse --sweep

Two patterns: the block-diagonal one of a mixture's hidden layer, and random tiles at 50%.  The yardsticks are dense
cuBLAS products of equal operations and equal tiles per output: `batched`, one product per expert of the same rows and
features (a mixture with perfectly balanced experts, what MegaBlocks compares with, arXiv 2211.15841 sec. 6.3), and
`dense`, one product whose rows (or summed features) are reduced to the share of nonzero tiles.  No speed is printed
unless all variants agree with dense references.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.interleaved import Variant, environment, measure, require_gpu, unit_rates, write_csv
from kernels import block_sparse, reference
from kernels.grouped_reference import dense_from_tiles, tiles_from_dense
from kernels.tile_launch import TileConfig
from kernels.topology import Topology, expert_topology, from_mask

BLOCK = 128


class Pattern(NamedTuple):
    """A sparse [rows, columns] hidden layer with D features on the other side of either product."""

    name: str
    rows: int
    columns: int
    D: int
    experts: int
    density: float


PATTERNS = [
    Pattern("8 experts", 16384, 8 * 4096, 2048, 8, 1 / 8),
    Pattern("64 experts", 16384, 64 * 1024, 2048, 64, 1 / 64),
    Pattern("random half", 8192, 8192, 4096, 0, 0.5),
]


def make_topology(pattern: Pattern, block: tuple[int, int] = (BLOCK, BLOCK)) -> Topology:
    """Balanced experts, or random tiles at exactly the given density in each row of blocks."""
    if pattern.experts:
        offsets = torch.arange(pattern.experts + 1, device="cuda") * (pattern.rows // pattern.experts)
        features = pattern.columns // pattern.experts
        return expert_topology(offsets.to(torch.int32), pattern.rows // block[0], features, block)
    grid = pattern.rows // block[0], pattern.columns // block[1]
    order = torch.rand(grid, device="cuda").argsort(1)
    mask = torch.zeros(grid, dtype=torch.bool, device="cuda")
    mask.scatter_(1, order[:, : int(pattern.density * grid[1])], True)
    return from_mask(mask, block)


class Operands:
    """Values of one pattern."""

    def __init__(self, pattern: Pattern) -> None:
        torch.manual_seed(0)
        self.pattern, self.topology = pattern, make_topology(pattern)
        M, N, D, t = pattern.rows, pattern.columns, pattern.D, self.topology
        self.x = torch.randn(M, D, device="cuda", dtype=torch.bfloat16)
        self.up = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
        self.values = torch.randn(t.capacity, *t.block, device="cuda", dtype=torch.bfloat16)
        self.x8 = torch.randint(-127, 128, (M, D), device="cuda", dtype=torch.int8)
        self.up8 = torch.randint(-1, 2, (N, D), device="cuda", dtype=torch.int8)
        self.values8 = torch.randint(-127, 128, (t.capacity, *t.block), device="cuda", dtype=torch.int8)
        self.down8 = self.up8.t().contiguous()
        self.row_scale, self.column_scale = torch.rand(M, device="cuda"), torch.rand(N, device="cuda")
        self.feature_scale = torch.rand(D, device="cuda")

    def calls(self) -> dict[str, Callable[[TileConfig | None], Tensor]]:
        """Our products."""
        o, t = self, self.topology
        return {
            "sdd bf16": lambda c: block_sparse.sdd(o.x, o.up, t, b_layout="nk", config=c),
            "dsd bf16": lambda c: block_sparse.dsd(o.values, o.up, t, config=c),
            "dsd S^T bf16": lambda c: block_sparse.dsd(o.values, o.x, t, form="S^T", config=c),
            "sdd int8": lambda c: block_sparse.sdd(
                o.x8, o.up8, t, b_layout="nk", a_scale_M=o.row_scale, b_scale_N=o.column_scale, config=c
            ),
            "dsd int8": lambda c: block_sparse.dsd(
                o.values8, o.down8, t, b_layout="nk", row_scale_M=o.row_scale, column_scale_N=o.feature_scale, config=c
            ),
        }

    def references(self) -> dict[str, tuple[Callable[[], Tensor], float]]:
        """Dense products of the same values, and the largest relative error; 0 means bit for bit."""
        t = self.topology

        def tiles(dense: Tensor) -> Tensor:
            return tiles_from_dense(dense, t.rows, t.columns, t.block)

        def dense(values: Tensor) -> Tensor:
            return dense_from_tiles(values, t.rows, t.columns, t.block, t.grid)

        def exact(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
            return reference.linear(
                x, weight, x_scale_T1=x_scale[:, None], weight_scale_O=weight_scale, dtype=torch.bfloat16
            )

        return {
            "sdd bf16": (lambda: tiles(self.x.float() @ self.up.float().t()), 2**-8),
            "dsd bf16": (lambda: dense(self.values).float() @ self.up.float(), 2**-8),
            "dsd S^T bf16": (lambda: dense(self.values).float().t() @ self.x.float(), 2**-8),
            "sdd int8": (lambda: tiles(exact(self.x8, self.up8, self.row_scale, self.column_scale)), 0.0),
            "dsd int8": (lambda: exact(dense(self.values8), self.down8, self.row_scale, self.feature_scale), 0.0),
        }

    def baselines(self, name: str) -> dict[str, Variant]:
        """cuBLAS products of equal operations."""
        p = self.pattern
        product, kind = name.rsplit(" ", 1)
        M, N, K = _equal_dense(p, product)
        if kind == "int8":
            a8, b8 = self.x8.new_ones(M, K), self.x8.new_ones(N, K)
            a8.random_(-127, 128)
            b8.random_(-1, 2)
            return {"dense": lambda: torch._int_mm(a8, b8.t())}
        a, b = (torch.randn(size, K, device="cuda", dtype=torch.bfloat16) for size in (M, N))
        found: dict[str, Variant] = {"dense": lambda: a @ b.t()}
        if p.experts:
            E, T, F = p.experts, p.rows // p.experts, p.columns // p.experts
            batch = {"sdd": (T, F, p.D), "dsd": (T, p.D, F), "dsd S^T": (F, p.D, T)}[product]
            ae = torch.randn(E, batch[0], batch[2], device="cuda", dtype=torch.bfloat16)
            be = torch.randn(E, batch[1], batch[2], device="cuda", dtype=torch.bfloat16)
            found["batched"] = lambda: torch.bmm(ae, be.transpose(1, 2))
        return found


def _equal_dense(pattern: Pattern, product: str) -> tuple[int, int, int]:
    """(M, N, K) of a dense product with as many multiplications: the sparse side's other dimension shrinks."""
    share = int(pattern.columns * pattern.density)
    if product == "sdd":
        return pattern.rows, share, pattern.D
    if product == "dsd":
        return pattern.rows, pattern.D, share
    return share, pattern.D, pattern.rows


def gate(operands: Operands) -> list[str]:
    """Descriptions of the products that disagree with their reference."""
    failures = []
    calls = operands.calls()
    for name, (make_reference, bound) in operands.references().items():
        got, want = calls[name](None), make_reference()
        if bound:
            error = float((got.float() - want.float()).norm() / want.float().norm())
        else:
            error = float((got != want).float().mean())
        print(f"  {name:14s} relative error {error:.2e} (bound {bound:.2e})", flush=True)
        if not error <= bound:
            failures.append(f"{operands.pattern.name} {name}: {error:.2e} > {bound:.2e}")
        del got, want
        torch.cuda.empty_cache()
    return failures


def compare(operands: Operands, rates: dict[str, float]) -> list[dict[str, object]]:
    """Time our products and the dense ones of equal operations; one row each."""
    rows: list[dict[str, object]] = []
    pattern, tiles = operands.pattern, operands.topology.capacity
    operations = 2 * tiles * BLOCK * BLOCK * pattern.D
    for name, call in operands.calls().items():
        variants: dict[str, Variant] = {"ours": lambda call=call: call(None)}  # type: ignore[misc]
        variants |= operands.baselines(name)
        timings = measure(variants)
        floor = operations / rates[name.rsplit(" ", 1)[1]] * 1e3
        for key, timing in timings.items():
            row: dict[str, object] = {"pattern": pattern.name, "product": name, "variant": key}
            row |= {
                "median_ms": round(timing.median, 4),
                "q25_ms": round(timing.low, 4),
                "q75_ms": round(timing.high, 4),
            }
            row |= {"tera_ops": round(operations / timing.median * 1e-9, 1), "floor_ms": round(floor, 4)}
            row["ours_to_this"] = round(timings["ours"].median / timing.median, 3)
            rows.append(row)
            print("  " + "  ".join(f"{value}" for value in row.values()), flush=True)
        del variants
        torch.cuda.empty_cache()
    return rows


def sweep(operands: Operands) -> None:
    """Print the time of every tile shape, best first, for each product."""
    for name, call in operands.calls().items():
        k = 128 if name.endswith("int8") else 64
        if name.startswith("sdd"):
            shapes = [(128, k, 4, 3, 2), (128, k, 4, 4, 1), (128, k, 8, 4, 1), (128, k, 8, 3, 2), (128, 2 * k, 8, 3, 1)]
        else:
            shapes = [(256, k, 8, 5, 1), (256, k, 8, 7, 1), (128, k, 4, 5, 1), (128, k, 4, 7, 1), (128, k, 8, 7, 1)]
        found = []
        for n, block_k, warps, stages, programs in shapes:
            config = TileConfig(128, n, block_k, num_warps=warps, num_stages=stages, programs_per_sm=programs)
            try:
                timing = measure({"": lambda c=config, call=call: call(c)}, rounds=3)[""]  # type: ignore[misc]
            except Exception as error:  # a shape that does not fit the chip is an answer, too
                print(f"  {name} {config}: {type(error).__name__} {str(error)[:100]}")
                continue
            found.append((timing.median, config))
        print(f"{operands.pattern.name} {name}")
        for median, config in sorted(found, key=lambda pair: pair[0]):
            print(f"  {median:8.4f} ms  {config}", flush=True)


def main() -> None:
    """Parse arguments, gate, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time tile shapes instead of comparing with cuBLAS")
    parser.add_argument("--patterns", type=int, nargs="*", help="indices into the list of patterns (sweep: 0)")
    parser.add_argument("--csv", type=Path, help="where the table goes")
    arguments = parser.parse_args()
    require_gpu()
    print(environment())
    chosen = arguments.patterns or ([0] if arguments.sweep else list(range(len(PATTERNS))))
    if arguments.sweep:
        for index in chosen:
            sweep(Operands(PATTERNS[index]))
        return
    failures = []
    for index in chosen:
        print(PATTERNS[index])
        failures += gate(Operands(PATTERNS[index]))
    if failures:
        sys.exit("no speed from wrong results:\n  " + "\n  ".join(failures))
    rates = unit_rates()
    print("dense products: " + ", ".join(f"{unit} {rate * 1e-12:.0f} T/s" for unit, rate in rates.items()))
    rows = [row for index in chosen for row in compare(Operands(PATTERNS[index]), rates)]
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
