"""One linear layer, forward and backward: Q-Sparse BitNet at 50% sparsity against dense bf16, naive code and FP8.

Three contests per shape, all on the same values:

    forward product         the GEMM alone: int8 x ternary against cuBLAS in bf16, int8 and FP8
    forward and backward    the whole layer through autograd, with every pass that it needs
    passes                  the kernels one by one; their sum against the whole shows what autograd adds

`ours` runs `qsparse_layers.functional.qsparse_linear`.  Ternary codes come from the cache, as in all microbatches but
the first (with `run.keep_bf16_weights` also in bf16, as dX wants them); Transformer Engine keeps its FP8 weight, too.
The naive code makes its ternary weight in every call, as such code does.
"""

# ruff: noqa: E741 - O is a dimension
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kernels import gradients, reference
from kernels.dispatch import Kernels, ReferenceKernels, kernels_for
from kernels.gemm import gemm
from kernels.sparsify import sparsify
from pipeline.bench.kernels import naive
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch, relative_error
from pipeline.bench.kernels.layer_report import FORWARD, PASSES, WHOLE, draw, table
from pipeline.bench.kernels.timing import Call, Rates
from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import LinearCall, TernaryCache, WeightParts

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 8192))
SPARSITY = 0.5
DENSE, EXACT, FAST = "dense bf16", "ours exact", "ours fast"
KEPT = "ours exact, bf16 weights kept"
_EXACT_FORMAT = LinearFormat(sparsity=SPARSITY, weights="ternary", activations="int8")
_FAST_FORMAT = LinearFormat(sparsity=SPARSITY, weights="ternary", activations="int8", gradients="e4m3")

Layer = Callable[[Tensor], Tensor]
Maker = Callable[[Tensor], tuple[Layer, Tensor]]


class LayerCase:
    """A layer of D input and O output features on T tokens.

    Args:
        D: input features.
        O: output features.
        tokens: T.
        device: where.
        kernels: what `ours` runs on; None: the fast ones of the device.
        keeping: the same for weights kept in bf16.
        compiled: time the compiled naive layer, too.
    """

    def __init__(
        self,
        D: int,
        O: int,
        tokens: int,
        device: str,
        *,
        kernels: Kernels | None = None,
        keeping: Kernels | None = None,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self._sizes = tokens, D, O
        self._kernels = kernels or kernels_for(device)
        self._keeping = keeping or kernels or kernels_for(device, keep_bf16_weights=True)
        self._compiled = compiled
        self._kept = int((1 - SPARSITY) * D)
        self.x = torch.randn(tokens, D, device=device).bfloat16().requires_grad_()
        self.weight = (0.02 * torch.randn(O, D, device=device)).bfloat16().requires_grad_()
        spread = torch.exp(torch.randn(tokens, 1, device=device))
        self.grad = (1e-4 * spread * torch.randn(tokens, O, device=device)).bfloat16()

    makers: ClassVar[Mapping[str, Maker]] = {"Transformer Engine FP8": naive.transformer_engine_fp8}
    """Layers of other libraries, from a weight; each also gives its parameter."""

    def layers(self) -> dict[str, Layer]:
        """Those that need no other library."""
        weight = self.weight
        return {
            DENSE: lambda x: torch.nn.functional.linear(x, weight),
            "naive": lambda x: naive.naive_linear(x, weight, self._kept),
            EXACT: self._ours(_EXACT_FORMAT, self._kernels),
            FAST: self._ours(_FAST_FORMAT, self._kernels),
        }

    def _ours(self, layout: LinearFormat, kernels: Kernels) -> Layer:
        call = LinearCall(
            layout,
            WeightParts(1, (self._sizes[2],)),
            sparsity=SPARSITY,
            kernels=kernels,
            cache=TernaryCache(),
            weight_version=0,
            expander=kernels.expander if layout.gradients == "full" else None,
        )
        return lambda x: qsparse_linear(x, self.weight, call)

    def checks(self) -> Iterator[Check]:
        """Output bit for bit, gradients within rounding of their reference, and what 8-bit gradients cost."""
        exact_gradients: tuple[Tensor, ...] = ()
        for name, layout in ((EXACT, _EXACT_FORMAT), (FAST, _FAST_FORMAT)):
            y, dx, dw = self._outcome(self._ours(layout, self._kernels))
            want_y, want_dx, want_dw = self._outcome(self._ours(layout, ReferenceKernels()))
            yield Check(f"{name}, output", mismatch(y, want_y), 0.0)
            yield Check(f"{name}, dX", relative_error(dx, want_dx), 2**-7)
            yield Check(f"{name}, dW", relative_error(dw, want_dw), 2**-7)
            if name == EXACT:
                exact_gradients = want_dx, want_dw
                kept = self._outcome(self._ours(layout, self._keeping))
                same = max(mismatch(*pair) for pair in zip(kept, (y, dx, dw), strict=True))
                yield Check(f"{KEPT}: the bits of {EXACT}", same, 0.0)
            else:
                yield Check("dX of ours fast against exact", relative_error(dx, exact_gradients[0]), 2**-4)
                yield Check("dW of ours fast against exact", relative_error(dw, exact_gradients[1]), 2**-4)

    def _outcome(self, layer: Layer) -> tuple[Tensor, ...]:
        y = layer(self.x)
        return (y.detach(), *torch.autograd.grad(y, (self.x, self.weight), self.grad))

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """Product, whole layer, single passes."""
        yield self._forward_product(rates)
        ours = self.layers()
        rivals: dict[str, Call] = {"naive": self.train(ours.pop("naive"))}
        if self._compiled:
            compiled = torch.compile(partial(naive.naive_linear, weight=self.weight, kept=self._kept), dynamic=False)
            rivals["naive compiled"] = self.train(compiled)
        ours = {
            DENSE: ours[DENSE],
            EXACT: ours[EXACT],
            KEPT: self._ours(_EXACT_FORMAT, self._keeping),
            FAST: ours[FAST],
        }
        variants = {name: self.train(layer) for name, layer in ours.items()}
        floors = self.floors(rates)
        yield Contest(WHOLE, variants, rivals=rivals | self.libraries(), baseline=DENSE, floors=floors)
        yield Contest(PASSES, dict(self._passes()))

    def floors(self, rates: Rates) -> dict[str, float]:
        """Microseconds of the three products alone at the rates of the vendor's library."""
        product = {unit: 2 * math.prod(self._sizes) / rate for unit, rate in rates.operations_per_us.items()}
        return {
            DENSE: 3 * product["bf16"],
            EXACT: product["int8"] + 2 * product["bf16"],
            KEPT: product["int8"] + 2 * product["bf16"],
            FAST: product["int8"] + 2 * product["fp8"],
        }

    def train(self, layer: Layer, weight: Tensor | None = None) -> Call:
        """Forward and backward of a layer, `weight` being its parameter if it is not ours."""
        inputs = self.x, self.weight if weight is None else weight
        return lambda: torch.autograd.grad(layer(self.x), inputs, self.grad)

    def libraries(self) -> dict[str, Call]:
        """Forward and backward of other libraries' layers; what cannot be made raises when it is called."""
        found: dict[str, Call] = {}
        for name, make in self.makers.items():
            try:
                found[name] = self.train(*make(self.weight.detach()))
            except Exception as error:  # other people's code
                found[name] = partial(_absent, error)
        return found

    def _forward_product(self, rates: Rates) -> Contest:
        codes, scale = sparsify(self.x.detach(), self._kept)
        ternary, weight_scale = self._ternary()
        x, weight = gradients.dequantize(codes, scale), gradients.dequantize(ternary, None) * weight_scale.bfloat16()
        x8, weight8 = x.to(torch.float8_e4m3fn), ternary.to(torch.float8_e4m3fn)
        one = torch.ones((), device=x.device)
        operations = 2 * math.prod(self._sizes)
        return Contest(
            FORWARD,
            {
                "cuBLAS bf16": lambda: x @ weight.t(),
                "ours int8": lambda: gemm(codes, ternary, a_scale=scale.flatten(), b_scale=weight_scale),
            },
            rivals={
                "torch._int_mm": lambda: torch._int_mm(codes, ternary.t()),
                "torch._scaled_mm FP8": lambda: torch._scaled_mm(
                    x8, weight8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                ),
            },
            baseline="cuBLAS bf16",
            floors={
                "cuBLAS bf16": operations / rates.operations_per_us["bf16"],
                "ours int8": operations / rates.operations_per_us["int8"],
            },
        )

    def _ternary(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.detach()
        scale = reference.absmean_scale(reference.absmean_sum(weight), weight.numel()).view(1)
        return reference.ternary_codes(weight, scale), scale

    def _passes(self) -> Iterator[tuple[str, Call]]:
        x, weight, grad = self.x.detach(), self.weight.detach(), self.grad
        codes, scale = sparsify(x, self._kept)
        ternary, weight_scale = self._ternary()
        yield "dense: forward", lambda: x @ weight.t()
        yield "dense: dX", lambda: grad @ weight
        yield "dense: dW", lambda: grad.t() @ x
        yield "both: sparsify", lambda: sparsify(x, self._kept)
        yield "both: forward", lambda: gemm(codes, ternary, a_scale=scale.flatten(), b_scale=weight_scale)
        weight_bf16, x_bf16 = gradients.dequantize(ternary, None), gradients.dequantize(codes, scale.flatten())
        yield "exact: weight to bf16", lambda: gradients.dequantize(ternary, None)
        yield "exact: dX", lambda: gemm(grad, weight_bf16, b_k_major=False, b_scale=weight_scale)
        yield "exact: input to bf16", lambda: gradients.dequantize(codes, scale.flatten())
        yield "exact: dW", lambda: grad.t() @ x_bf16
        rounded = gradients.quantize_gradient(grad, scale.flatten(), None)
        x_DT = gradients.transposed_input(codes, scale.flatten(), rounded)
        weight_DO = gradients.transposed_weight(ternary)
        yield "fast: gradient to e4m3", lambda: gradients.quantize_gradient(grad, scale.flatten(), None)
        yield "fast: transpose weight", lambda: gradients.transposed_weight(ternary)
        yield (
            "fast: dX",
            lambda: gemm(rounded.codes_TO, weight_DO, a_scale=rounded.scale_T1.flatten(), b_scale=weight_scale),
        )
        yield "fast: transpose input", lambda: gradients.transposed_input(codes, scale.flatten(), rounded)
        yield "fast: dW", lambda: gemm(rounded.transposed_OT, x_DT, b_scale=rounded.common)


def _absent(error: Exception) -> None:
    raise error


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    return {
        f"{D} -> {O}": partial(LayerCase, D, O, TOKENS, options.device, compiled=not options.quick) for D, O in shapes
    }


SECTION = Section(
    f"One linear layer, {TOKENS} tokens, sparsity {SPARSITY:g}",
    cases=_cases,
    draw=draw,
    table=table,
)
