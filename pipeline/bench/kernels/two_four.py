"""2:4 activations on the sparse tensor cores, by cuSPARSELt, against a dense int8 product that ignores the zeros.

With the pattern 2:4 half of every four activations are zero, which Hopper's sparse instructions skip: at most twice the
rate of a dense product.  They want the sparse operand compressed (values, and two bits for each place), and since
activations change with every token, compressing belongs to each product:

    product             dense bf16 and int8 against sparse bf16, int8 and FP8, operands as each wants them
    with compression    the same from the codes that `sparsify` writes
    compress            that pass alone, against a copy of the bytes that it reads and writes

cuSPARSELt's int8 products come without scales of tokens; a layer would need another pass for them, which is left out
in its favor.
"""

# ruff: noqa: E741 - O is a dimension
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.gemm import gemm
from kernels.sparsify import sparsify
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch, relative_error
from pipeline.bench.kernels.drawing import ratio_bars, ratio_table, speedup
from pipeline.bench.kernels.layer import SHAPES, TOKENS
from pipeline.bench.kernels.timing import Call, Rates, runnable

BASELINE, OURS = "cuBLAS bf16", "ours int8, dense"
TYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class TwoFourCase:
    """2:4 codes of T tokens times ternary codes of a weight [O, D].

    Args:
        D: input features.
        O: output features.
        tokens: T.
        device: where.
        product: ours.
    """

    def __init__(self, D: int, O: int, tokens: int, device: str, *, product: Callable[..., Tensor] = gemm) -> None:
        torch.manual_seed(0)
        self._sizes, self._product = (tokens, D, O), product
        x = torch.randn(tokens, D, device=device).bfloat16()
        self._codes, self._scale = sparsify(x, 2, 4)
        self._ternary = torch.randint(-1, 2, (O, D), dtype=torch.int8, device=device)
        self._weight_scale = torch.rand(1, device=device)

    def checks(self) -> Iterator[Check]:
        """Our product bit for bit; of cuSPARSELt's those that run here, whose sums are rounded once."""
        scales: dict[str, Any] = {"x_scale_T1": self._scale, "weight_scale_O": self._weight_scale}
        want = reference.linear(self._codes, self._ternary, **scales, dtype=torch.bfloat16)
        yield Check(OURS, mismatch(self._ours(), want), 0.0)
        for name in runnable({name: self._with_compression(name) for name in TYPES})[0]:
            codes, weight = (operand.to(TYPES[name]).float() for operand in (self._codes, self._ternary))
            got = self._with_compression(name)()
            yield Check(f"cuSPARSELt {name}", relative_error(got, codes @ weight.t()), 2**-7)

    def _ours(self) -> Tensor:
        return self._product(self._codes, self._ternary, a_scale=self._scale.flatten(), b_scale=self._weight_scale)

    def _operands(self, name: str) -> tuple[Tensor, Tensor]:
        """x [T, D] and weight^T [D, O]; codes above 16 lose digits in FP8, which costs no time."""
        return self._codes.to(TYPES[name]), self._ternary.to(TYPES[name]).t()

    def _with_compression(self, name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x, weight = self._operands(name)
            return _sparse_product(torch._cslt_compress(x), weight)

        return run

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """Products, products with compression, compression."""
        x, weight = self._operands("bf16")
        dense: dict[str, Call] = {BASELINE: lambda: x @ weight, OURS: self._ours}
        products: dict[str, Call] = {}
        whole: dict[str, Call] = {}
        compress: dict[str, Call] = {}
        for name in TYPES:
            label = f"cuSPARSELt {name}"
            try:
                operands = self._operands(name)
                products[label] = partial(_sparse_product, torch._cslt_compress(operands[0]), operands[1])
                whole[label] = partial(_compressed_product, *operands)
                compress[label] = partial(torch._cslt_compress, operands[0])
            except RuntimeError as error:  # a build or a chip without it
                products[label] = partial(_absent, error)
        product = {unit: 2 * math.prod(self._sizes) / rate for unit, rate in rates.operations_per_us.items()}
        floors = {BASELINE: product["bf16"], OURS: product["int8"]}
        floors |= {f"cuSPARSELt {name}": product[name] / 2 for name in TYPES if name in product}
        yield Contest("product", dense, rivals=products, baseline=BASELINE, floors=floors)
        if whole:
            yield Contest("with compression", dense, rivals=whole, baseline=BASELINE, floors=floors)
        for label, call in compress.items():
            width = TYPES[label.split()[1]].itemsize
            moved = math.prod(self._sizes[:2])
            yield Contest(f"compress, {label.split()[1]}", {}, rivals={label: call}, copy_bytes=_bytes(moved, width))


def _bytes(elements: int, width: int) -> int:
    """Read in full; written: half of the values, and two bits of place for each of these."""
    return elements * width + elements * width // 2 + elements // 8


def _sparse_product(compressed: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch._cslt_sparse_mm(compressed, weight, out_dtype=torch.bfloat16)
    return y


def _compressed_product(x: Tensor, weight: Tensor) -> Tensor:
    return _sparse_product(torch._cslt_compress(x), weight)


def _absent(error: Exception) -> None:
    raise error


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    return {f"{D} -> {O}": partial(TwoFourCase, D, O, TOKENS, options.device) for D, O in shapes}


SECTION = Section(
    f"2:4 activations on the sparse tensor cores, {TOKENS} tokens (speed-up over cuBLAS bf16)",
    cases=_cases,
    draw=ratio_bars(speedup, "speed-up over cuBLAS bf16"),
    table=ratio_table(speedup, "x"),
)
