"""Grouped products of experts against torch._grouped_mm (bfloat16) and Transformer Engine, all three passes.

    python -m benchmarks.kernels_grouped --csv grouped.csv          # correctness gate, then the table
    python -m benchmarks.kernels_grouped --sweep                    # best tile shapes per product

Every variant gets the same values.  No speed is printed unless all variants agree with the references.  `floor` is
operations over the rate that a dense 8192^3 product of the same type reached in this run.
"""

# ruff: noqa: E741 - O is a dimension
import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.interleaved import Variant, environment, measure, require_gpu, runnable, unit_rates, write_csv
from kernels import grouped_gemm, grouped_reference, grouped_wgrad
from kernels.tile_launch import TileConfig

FP8 = torch.float8_e4m3fn


class Shape(NamedTuple):
    """E experts, T token copies (tokens times top-k), D and O features."""

    E: int
    T: int
    D: int
    O: int


SHAPES = [
    Shape(8, 16384, 4096, 14336),
    Shape(64, 65536, 2048, 1024),
    Shape(8, 16384, 2048, 4096),
    Shape(64, 16384, 2048, 4096),
]


class Case(NamedTuple):
    """One product: our call (which takes a tile shape), its reference, and the unit whose rate is the floor."""

    call: Callable[..., Tensor]
    default: TileConfig
    unit: str


def token_offsets(shape: Shape, seed: int = 0) -> Tensor:
    """Offsets of a skewed routing: expert shares from a softmax of normal scores; one expert stays empty."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.softmax(0.5 * torch.randn(shape.E, generator=generator), 0)
    shares[-1] = 0.0
    experts = torch.multinomial(shares, shape.T, replacement=True, generator=generator)
    counts = torch.bincount(experts, minlength=shape.E)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32).cuda()


class Operands:
    """The values of one shape, in every storage that a variant reads."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        E, T, D, O = shape
        self.shape = shape
        self.offsets = token_offsets(shape)
        self.codes_TD = torch.randint(-127, 128, (T, D), device="cuda", dtype=torch.int8)
        self.weight_EOD = torch.randint(-1, 2, (E, O, D), device="cuda", dtype=torch.int8)
        self.x_scale_T = torch.rand(T, device="cuda") + 0.1
        self.weight_scale_EP = torch.rand(E, 1, device="cuda") + 0.1
        self.weight_bf16_EOD = self.weight_EOD.bfloat16()
        self.weight_fp8_EDO = self.weight_bf16_EOD.transpose(1, 2).contiguous().to(FP8)
        self.codes_bf16_TD = self.codes_TD.bfloat16()
        self.grad_TO = torch.randn(T, O, device="cuda", dtype=torch.bfloat16)
        self.grad_fp8_TO = self.grad_TO.to(FP8)
        self.ones_T = torch.ones(T, device="cuda")
        self.grad_packed = grouped_wgrad.pack_transposed(self.grad_TO, self.offsets)
        self.x_packed = grouped_wgrad.pack_transposed(self.codes_bf16_TD, self.offsets)

    def cases(self) -> dict[str, dict[str, Case]]:
        """Our variants of each pass."""
        o = self
        (grad_OT, grad_scale, padded), (x_DT, x_scale, _) = o.grad_packed, o.x_packed
        forward = _bind(
            grouped_gemm.grouped_forward, o.codes_TD, o.weight_EOD, o.offsets,
            x_scale_T=o.x_scale_T, weight_scale_EP=o.weight_scale_EP,
        )  # fmt: skip
        dgrad = _bind(
            grouped_gemm.grouped_dgrad, o.grad_TO, o.weight_bf16_EOD, o.offsets, weight_scale_EP=o.weight_scale_EP
        )
        dgrad_fp8 = _bind(
            grouped_gemm.grouped_dgrad_fp8, o.grad_fp8_TO, o.weight_fp8_EDO, o.offsets,
            grad_scale_T=o.ones_T, weight_scale_EP=o.weight_scale_EP,
        )  # fmt: skip
        wgrad = _bind(grouped_wgrad.grouped_wgrad, o.grad_TO, o.codes_bf16_TD, o.offsets, dtype=torch.bfloat16)
        wgrad_fp8 = _bind(
            grouped_wgrad.grouped_wgrad_fp8, grad_OT, x_DT, padded,
            grad_scale_EO=grad_scale, x_scale_ED=x_scale, dtype=torch.bfloat16,
        )  # fmt: skip
        return {
            "forward": {"int8": Case(forward, grouped_gemm.FORWARD_CONFIG, "int8")},
            "dgrad": {
                "bf16": Case(dgrad, grouped_gemm.DGRAD_CONFIG, "bf16"),
                "fp8": Case(dgrad_fp8, grouped_gemm.DGRAD_FP8_CONFIG, "fp8"),
            },
            "wgrad": {
                "bf16": Case(wgrad, grouped_wgrad.WGRAD_CONFIG, "bf16"),
                "fp8": Case(wgrad_fp8, grouped_wgrad.WGRAD_FP8_CONFIG, "fp8"),
            },
        }

    def baselines(self, name: str) -> dict[str, Variant]:
        """Other libraries' bfloat16 products of the same values, without scales."""
        ends, x, grad, weight = self.offsets[1:], self.codes_bf16_TD, self.grad_TO, self.weight_bf16_EOD
        torch_variant: dict[str, Variant] = {
            "forward": lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends),
            "dgrad": lambda: torch._grouped_mm(grad, weight, offs=ends),
            "wgrad": lambda: torch._grouped_mm(grad.t(), x, offs=ends),
        }
        found = {"torch._grouped_mm": torch_variant[name]}
        if name == "forward":
            found |= _transformer_engine(self)
        return found

    def references(self) -> dict[tuple[str, str], tuple[Callable[[], Tensor], float]]:
        """(pass, variant) -> the reference and the largest relative error; 0 means bit for bit."""
        o = self
        scales = {"weight_scale_EP": o.weight_scale_EP}

        def packed_wgrad() -> Tensor:
            (grad_OT, grad_scale, padded), (x_DT, x_scale, _) = o.grad_packed, o.x_packed
            codes = grouped_reference.grouped_wgrad(grad_OT.float().t(), x_DT.float().t(), padded)
            return codes * grad_scale[:, :, None] * x_scale[:, None, :]

        return {
            ("forward", "int8"): (
                lambda: grouped_reference.grouped_forward(
                    o.codes_TD, o.weight_EOD, o.offsets, x_scale_T=o.x_scale_T, **scales
                ),
                0.0,
            ),
            ("dgrad", "bf16"): (
                lambda: grouped_reference.grouped_dgrad(o.grad_TO, o.weight_EOD, o.offsets, **scales),
                2**-8,
            ),
            ("dgrad", "fp8"): (
                lambda: grouped_reference.grouped_dgrad(o.grad_fp8_TO, o.weight_EOD, o.offsets, **scales),
                2**-7,
            ),
            ("wgrad", "bf16"): (lambda: grouped_reference.grouped_wgrad(o.grad_TO, o.codes_bf16_TD, o.offsets), 2**-8),
            ("wgrad", "fp8"): (packed_wgrad, 2**-7),
        }


def _bind(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Callable[..., Tensor]:
    return lambda config: function(*args, **kwargs, config=config)


def _transformer_engine(operands: Operands) -> dict[str, Variant]:
    try:
        from transformer_engine.pytorch import GroupedLinear
    except ImportError:
        return {}
    E, _, D, O = operands.shape
    layer = GroupedLinear(E, D, O, bias=False, params_dtype=torch.bfloat16, device="cuda")
    splits = operands.offsets.diff().tolist()  # its counts live on the host

    def forward() -> object:
        with torch.no_grad():
            return layer(operands.codes_bf16_TD, splits)

    return {"TE GroupedLinear": forward}


def gate(operands: Operands) -> list[str]:
    """Descriptions of the variants that disagree with their reference."""
    failures = []
    cases = operands.cases()
    for (name, variant), (reference, bound) in operands.references().items():
        case = cases[name][variant]
        got, want = case.call(case.default), reference()
        error = _relative_error(got, want, exact=bound == 0.0)
        print(f"  {name:8s} {variant:5s} relative error {error:.2e} (bound {bound:.2e})", flush=True)
        if not error <= bound:
            failures.append(f"{name} {variant} at {operands.shape}: {error:.2e} > {bound:.2e}")
        del got, want
        torch.cuda.empty_cache()
    return failures


def _relative_error(got: Tensor, want: Tensor, *, exact: bool) -> float:
    if exact:
        return float((got != want).float().mean())
    squares = torch.zeros(2, dtype=torch.float64, device="cuda")
    for g, w in zip(got, want, strict=True):  # row by row: a float64 copy of the whole would not fit beside it
        squares += torch.stack([(g.double() - w).square().sum(), w.double().square().sum()])
    return float((squares[0] / squares[1]).sqrt())


def compare(operands: Operands, rates: dict[str, float]) -> list[dict[str, object]]:
    """Time all variants of all passes; one row each."""
    rows = []
    shape = operands.shape
    operations = 2 * shape.T * shape.D * shape.O
    for name, ours in operands.cases().items():
        variants: dict[str, Variant] = {key: _default_call(case) for key, case in ours.items()}
        variants |= runnable(operands.baselines(name))
        timings = measure(variants)
        baseline = timings["torch._grouped_mm"].median if "torch._grouped_mm" in timings else float("nan")
        for key, timing in timings.items():
            floor = operations / rates[ours[key].unit if key in ours else "bf16"] * 1e3
            row: dict[str, object] = {"pass": name, **shape._asdict(), "variant": key}
            row |= {
                "median_ms": round(timing.median, 4),
                "q25_ms": round(timing.low, 4),
                "q75_ms": round(timing.high, 4),
            }
            row |= {"tera_ops": round(operations / timing.median * 1e-9, 1), "floor_ms": round(floor, 4)}
            row["speedup"] = round(baseline / timing.median, 3)
            rows.append(row)
            print("  " + "  ".join(f"{value}" for value in row.values()), flush=True)
    return rows


def _default_call(case: Case) -> Variant:
    return lambda: case.call(case.default)


def sweep_configs(case: Case, *, eight_bit: bool) -> list[TileConfig]:
    """Tile shapes worth trying; 8-bit operands hold twice the features in the same bytes."""
    k = 128 if eight_bit else 64
    persistent = case.default.persistent
    shapes = [
        (128, 256, k, 8, 3, 1),
        (128, 256, k, 8, 4, 1),
        (256, 128, k, 8, 3, 1),
        (256, 128, k, 8, 4, 1),
        (128, 128, k, 4, 3, 2),
        (128, 128, k, 4, 4, 1),
        (128, 128, 2 * k, 8, 3, 1),
    ]
    configs = [
        TileConfig(m, n, kk, num_warps=w, num_stages=s, programs_per_sm=p, persistent=persistent)
        for m, n, kk, w, s, p in shapes
        if not (case.default is grouped_wgrad.WGRAD_FP8_CONFIG and kk > grouped_wgrad.TOKEN_PAD)
    ]
    return configs + [TileConfig(128, 256, k, num_warps=8, num_stages=3, persistent=not persistent)] * persistent


def sweep(operands: Operands) -> None:
    """Print every tile shape's time, best first, for each of our variants."""
    for name, ours in operands.cases().items():
        for key, case in ours.items():
            found = []
            for config in sweep_configs(case, eight_bit=key != "bf16"):
                try:
                    timing = measure({"": lambda c=config, call=case.call: call(c)}, rounds=3)[""]  # type: ignore[misc]
                except Exception as error:  # a shape that does not fit the chip is an answer, too
                    print(f"  {name} {key} {config}: {type(error).__name__} {str(error)[:100]}")
                    continue
                found.append((timing.median, config))
            print(f"{operands.shape} {name} {key}")
            for median, config in sorted(found, key=lambda pair: pair[0]):
                tera = 2 * operands.shape.T * operands.shape.D * operands.shape.O / median * 1e-9
                print(f"  {median:8.4f} ms {tera:7.1f} T/s  {config}", flush=True)


def main() -> None:
    """Parse arguments, gate, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time tile shapes instead of comparing libraries")
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into the list of shapes (sweep: 0 and 1)")
    parser.add_argument("--csv", type=Path, help="where the table goes")
    arguments = parser.parse_args()
    require_gpu()
    print(environment())
    chosen = arguments.shapes or ([0, 1] if arguments.sweep else list(range(len(SHAPES))))
    if arguments.sweep:
        for index in chosen:
            sweep(Operands(SHAPES[index]))
        return
    failures = []
    for index in chosen:
        print(SHAPES[index])
        failures += gate(Operands(SHAPES[index]))
    if failures:
        sys.exit("no speed from wrong results:\n  " + "\n  ".join(failures))
    rates = unit_rates()
    print("dense products: " + ", ".join(f"{unit} {rate * 1e-12:.0f} T/s" for unit, rate in rates.items()))
    rows = [row for index in chosen for row in compare(Operands(SHAPES[index]), rates)]
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
