"""What the exact mode pays for bringing codes to bf16 in its backward pass, and two ways to pay less.

    one after the other    sparsify, forward, weight to bf16, dX, input to bf16, dW: what `ExactBackward` does
    weight kept in bf16    made once per optimizer step (`run.keep_bf16_weights`): 2 more bytes per weight
    input beside dX        the input is expanded on a second stream while the tensor cores compute dX

All three compute the same bits.  The kernels are called without autograd, as one CUDA graph.
"""

# ruff: noqa: E741 - O is a dimension
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import gradients, reference
from kernels.gemm import gemm
from kernels.sparsify import sparsify
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch
from pipeline.bench.kernels.drawing import ratio_bars, ratio_table, speedup
from pipeline.bench.kernels.layer import SHAPES, SPARSITY, TOKENS
from pipeline.bench.kernels.timing import Rates

DENSE, PLAIN = "dense bf16", "one after the other"


class Results(NamedTuple):
    """Of a layer's forward and backward."""

    y: Tensor
    dx: Tensor
    dw: Tensor


class ExactWaysCase:
    """The kernels of an exact layer of D input and O output features on T tokens.

    Args:
        D: input features.
        O: output features.
        tokens: T.
        device: where.
    """

    def __init__(self, D: int, O: int, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        self._x = torch.randn(tokens, D, device=device).bfloat16()
        self._weight = (0.02 * torch.randn(O, D, device=device)).bfloat16()
        self._grad = 1e-4 * torch.randn(tokens, O, device=device).bfloat16()
        self._kept = int((1 - SPARSITY) * D)
        self._weight_scale = reference.absmean_scale(reference.absmean_sum(self._weight), D * O).view(1)
        self._ternary = reference.ternary_codes(self._weight, self._weight_scale)
        self._expanded = gradients.dequantize(self._ternary, None)
        self._side = torch.cuda.Stream() if device == "cuda" else None

    def dense(self) -> Results:
        """The three products of a layer in bf16."""
        return Results(self._x @ self._weight.t(), self._grad @ self._weight, self._grad.t() @ self._x)

    def plain(self, *, keep_weight: bool = False) -> Results:
        """One kernel after the other, with or without the pass over the weight."""
        codes, scale = sparsify(self._x, self._kept)
        y = gemm(codes, self._ternary, a_scale=scale.flatten(), b_scale=self._weight_scale)
        weight = self._expanded if keep_weight else gradients.dequantize(self._ternary, None)
        dx = gemm(self._grad, weight, b_k_major=False, b_scale=self._weight_scale)
        return Results(y, dx, self._grad.t() @ gradients.dequantize(codes, scale.flatten()))

    def beside(self, *, keep_weight: bool = False) -> Results:
        """The input is expanded on a second stream, from when dX begins."""
        codes, scale = sparsify(self._x, self._kept)
        y = gemm(codes, self._ternary, a_scale=scale.flatten(), b_scale=self._weight_scale)
        weight = self._expanded if keep_weight else gradients.dequantize(self._ternary, None)
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            x = gradients.dequantize(codes, scale.flatten())
        dx = gemm(self._grad, weight, b_k_major=False, b_scale=self._weight_scale)
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            x.record_stream(torch.cuda.current_stream())
        return Results(y, dx, self._grad.t() @ x)

    def ways(self) -> dict[str, Callable[[], Results]]:
        """By name."""
        return {
            PLAIN: self.plain,
            "weight kept in bf16": partial(self.plain, keep_weight=True),
            "input beside dX": self.beside,
            "both": partial(self.beside, keep_weight=True),
        }

    def checks(self) -> Iterator[Check]:
        """All ways give the bits of the first."""
        want = self.plain()
        for name, way in self.ways().items():
            yield Check(name, max(mismatch(*pair) for pair in zip(way(), want, strict=True)), 0.0)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """All ways, and a dense layer."""
        yield Contest("forward and backward", {DENSE: self.dense, **self.ways()}, baseline=DENSE)


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    return {f"{D} -> {O}": partial(ExactWaysCase, D, O, TOKENS, options.device) for D, O in shapes}


SECTION = Section(
    f"Ways of the exact backward pass, {TOKENS} tokens (speed-up over the three dense products)",
    cases=_cases,
    draw=ratio_bars(speedup, "speed-up over dense bf16"),
    table=ratio_table(speedup, "x"),
)
