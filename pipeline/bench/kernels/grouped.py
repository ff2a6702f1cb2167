"""Grouped products of experts against torch._grouped_mm (bf16) and Transformer Engine, and the layer made of them.

The three products alone are one thing, a layer's forward and backward with its quantization passes another: `layer`
times the whole, from the bf16 input and output gradient to the bf16 input and weight gradients, `passes` the parts that
are not products.  Ternary codes of the weight are made once per optimizer step, for all its microbatches; the pass over
the weight is what that adds to the e4m3 backward.
"""

# ruff: noqa: E741 - O is a dimension
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import gradients, grouped_gemm, grouped_gradients, grouped_reference, grouped_wgrad
from kernels.sparsify import sparsify
from kernels.tile_launch import HopperTile, TileConfig
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch, relative_error
from pipeline.bench.kernels.drawing import pass_table, ratio_bars, ratio_table, speedup
from pipeline.bench.kernels.timing import Call, Rates
from pipeline.bench.results import Row

TORCH, ENGINE = "torch._grouped_mm", "TE GroupedLinear"
PASSES = "passes"
SWEPT = (
    HopperTile(),
    HopperTile(group_m=4),
    HopperTile(group_m=16),
    HopperTile(128, 128, stages=6, warps=4),
    HopperTile(128, 128, stages=3, warps=4, programs_per_sm=2),
    HopperTile(256, 128),
)


class Shape(NamedTuple):
    """E experts, T token copies (tokens times top-k), D and O features."""

    E: int
    T: int
    D: int
    O: int


SHAPES = (Shape(8, 16384, 4096, 14336), Shape(64, 65536, 2048, 1408))


class Product(NamedTuple):
    """One of our products: the call, which may be given a tile shape, its reference, its error bound, its unit."""

    call: Callable[..., Any]
    reference: Callable[[], Tensor]
    bound: float
    unit: str
    portable: TileConfig


def token_offsets(shape: Shape, seed: int = 0) -> Tensor:
    """Offsets of a skewed routing: expert shares from a softmax of normal scores; one expert stays empty."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.softmax(0.5 * torch.randn(shape.E, generator=generator), 0)
    shares[-1] = 0.0
    experts = torch.multinomial(shares, shape.T, replacement=True, generator=generator)
    counts = torch.bincount(experts, minlength=shape.E)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


class GroupedCase:
    """The values of one shape, in every storage that a variant reads.

    Args:
        shape: sizes.
        device: where.
        forward: our forward product.
    """

    def __init__(
        self, shape: Shape, device: str, *, forward: Callable[..., Tensor] = grouped_gemm.grouped_forward
    ) -> None:
        torch.manual_seed(0)
        E, T, D, O = shape
        self._shape, self._forward = shape, forward
        self._offsets = token_offsets(shape).to(device)
        self._x = torch.randn(T, D, device=device).bfloat16()
        self._grad = torch.randn(T, O, device=device).bfloat16()
        self._weight = torch.randint(-1, 2, (E, O, D), device=device, dtype=torch.int8)
        self._scale: dict[str, Any] = {"weight_scale_EP": torch.rand(E, 1, device=device) + 0.1}
        self._weight_bf16 = self._weight.bfloat16()
        self._weight_DEO = grouped_gradients.transposed_weight(self._weight)
        self._codes, self._x_scale = self._quantized_input()
        self._x_bf16 = gradients.dequantize(self._codes, self._x_scale)
        self._rounded = self._quantized_gradient(self._x_scale)
        self._x_DT = grouped_gradients.transposed_input(self._codes, self._x_scale, self._rounded)

    def _quantized_input(self) -> tuple[Tensor, Tensor]:
        codes, scale = sparsify(self._x, None)
        return codes, scale.flatten()

    def _quantized_gradient(self, x_scale: Tensor) -> grouped_gradients.GroupedGradient:
        return grouped_gradients.quantize_gradient(self._grad, self._offsets, x_scale_T=x_scale, **self._scale)

    def products(self) -> dict[str, dict[str, Product]]:
        """Our variants of each product."""
        o, g, gemm, wgrad = self, self._rounded, grouped_gemm, grouped_wgrad
        bf16: dict[str, Any] = {"dtype": torch.bfloat16}
        forward = partial(self._forward, o._codes, o._weight, o._offsets, x_scale_T=o._x_scale, **o._scale)
        dgrad = partial(gemm.grouped_dgrad, o._grad, o._weight_bf16, o._offsets, **o._scale)
        dgrad_8 = partial(gemm.grouped_dgrad_fp8, g.codes_TO, o._weight_DEO, o._offsets, grad_scale_T=g.scale_T)
        wgrad_16 = partial(wgrad.grouped_wgrad, o._grad, o._x_bf16, o._offsets, **bf16)
        scale: dict[str, Any] = {"scale_EP": g.wgrad_scale_EP}
        wgrad_8 = partial(wgrad.grouped_wgrad_fp8, g.transposed_OT, o._x_DT, g.padded_offsets, **scale, **bf16)
        want = grouped_reference
        want_forward = partial(want.grouped_forward, o._codes, o._weight, o._offsets, x_scale_T=o._x_scale, **o._scale)
        want_dgrad = partial(want.grouped_dgrad, o._grad, o._weight, o._offsets, **o._scale)
        want_wgrad = partial(want.grouped_wgrad, o._grad, o._x_bf16, o._offsets)
        # FP8 sums keep 13 bits below the largest of each 32 terms; e4m3 codes round by about 2.6% (rms), two by 3.7%.
        return {
            "forward": {"int8": Product(forward, want_forward, 0.0, "int8", gemm.FORWARD_CONFIG)},
            "dX": {
                "bf16": Product(dgrad, want_dgrad, 2**-8, "bf16", gemm.DGRAD_CONFIG),
                "e4m3": Product(dgrad_8, want_dgrad, 0.04, "fp8", gemm.DGRAD_FP8_CONFIG),
            },
            "dW": {
                "bf16": Product(wgrad_16, want_wgrad, 2**-8, "bf16", wgrad.WGRAD_CONFIG),
                "e4m3": Product(wgrad_8, want_wgrad, 0.06, "fp8", wgrad.WGRAD_FP8_CONFIG),
            },
        }

    def checks(self) -> Iterator[Check]:
        """Every product against its reference; bit for bit where the bound is 0."""
        for name, ours in self.products().items():
            for variant, product in ours.items():
                got, want = product.call(), product.reference()
                error = relative_error(got, want) if product.bound else mismatch(got, want)
                yield Check(f"{name}, {variant}", error, product.bound)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """Products, whole layer, other passes."""
        torch_products, engine = self._torch_products(), self._transformer_engine()
        product = {
            unit: 2 * self._shape.T * self._shape.D * self._shape.O / r for unit, r in rates.operations_per_us.items()
        }
        for name, ours in self.products().items():
            yield Contest(
                name,
                {f"ours {variant}": one.call for variant, one in ours.items()},
                rivals={TORCH: torch_products[name], **engine.get(name, {})},
                baseline=TORCH,
                floors={f"ours {v}": product[one.unit] for v, one in ours.items()} | {TORCH: product["bf16"]},
            )
        yield Contest(
            "layer",
            {"ours bf16": self._exact_layer, "ours e4m3": self._fast_layer},
            rivals={TORCH: lambda: [one() for one in torch_products.values()], **engine.get("layer", {})},
            baseline=TORCH,
            floors={
                "ours bf16": product["int8"] + 2 * product["bf16"],
                "ours e4m3": product["int8"] + 2 * product["fp8"],
                TORCH: 3 * product["bf16"],
            },
        )
        yield Contest(PASSES, self._passes())

    def _torch_products(self) -> dict[str, Call]:
        """PyTorch's bf16 products of the same values, without scales."""
        ends, x, grad, weight = self._offsets[1:], self._x_bf16, self._grad, self._weight_bf16
        return {
            "forward": lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends),
            "dX": lambda: torch._grouped_mm(grad, weight, offs=ends),
            "dW": lambda: torch._grouped_mm(grad.t(), x, offs=ends),
        }

    def _transformer_engine(self) -> dict[str, dict[str, Call]]:
        """Forward alone, and forward with backward, of its grouped layer in bf16; nothing where it is not installed."""
        try:
            from transformer_engine.pytorch import GroupedLinear
        except (ImportError, OSError):
            return {}
        E, _, D, O = self._shape
        layer = GroupedLinear(E, D, O, bias=False, params_dtype=torch.bfloat16, device=self._x.device)
        splits = self._offsets.diff().tolist()  # its counts live on the host
        x = self._x_bf16.clone().requires_grad_()

        def forward() -> object:
            with torch.no_grad():
                return layer(x, splits)

        def both() -> object:
            return torch.autograd.grad(layer(x, splits), [x, *layer.parameters()], self._grad)

        return {"forward": {ENGINE: forward}, "layer": {ENGINE: both}}

    def _fast_layer(self) -> object:
        codes, scale = self._quantized_input()
        y = self._forward(codes, self._weight, self._offsets, x_scale_T=scale, **self._scale)
        g = self._quantized_gradient(scale)
        dx = grouped_gemm.grouped_dgrad_fp8(g.codes_TO, self._weight_DEO, self._offsets, grad_scale_T=g.scale_T)
        x_DT = grouped_gradients.transposed_input(codes, scale, g)
        dw = grouped_wgrad.grouped_wgrad_fp8(
            g.transposed_OT, x_DT, g.padded_offsets, scale_EP=g.wgrad_scale_EP, dtype=torch.bfloat16
        )
        return y, dx, dw

    def _exact_layer(self) -> object:
        codes, scale = self._quantized_input()
        y = self._forward(codes, self._weight, self._offsets, x_scale_T=scale, **self._scale)
        dx = grouped_gemm.grouped_dgrad(self._grad, self._weight_bf16, self._offsets, **self._scale)
        x = gradients.dequantize(codes, scale)
        return y, dx, grouped_wgrad.grouped_wgrad(self._grad, x, self._offsets, dtype=torch.bfloat16)

    def _passes(self) -> dict[str, Call]:
        o = self
        return {
            "input to codes": o._quantized_input,
            "gradient to e4m3, both ways": partial(o._quantized_gradient, o._x_scale),
            "input to e4m3, transposed": lambda: grouped_gradients.transposed_input(o._codes, o._x_scale, o._rounded),
            "weight to e4m3, transposed": lambda: grouped_gradients.transposed_weight(o._weight),
        }

    def launches(self) -> Iterator[Contest]:
        """Tile shapes of the Hopper kernel, and the portable kernel."""
        for name, ours in self.products().items():
            for variant, product in ours.items():
                is_portable = (name, variant) == ("dW", "bf16")
                tiles = [product.portable] if is_portable else [*SWEPT, product.portable]
                yield Contest(f"{name}, {variant}", {str(tile): partial(product.call, config=tile) for tile in tiles})


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    return {
        f"{shape.E} experts, {shape.T} rows, {shape.D} -> {shape.O}": partial(GroupedCase, shape, options.device)
        for shape in (SHAPES[1:] if options.quick else SHAPES)
    }


def _compared(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["operation"] != PASSES]


def _table(rows: Sequence[Row]) -> str:
    passes = [row for row in rows if row["operation"] == PASSES]
    return "\n\n".join([ratio_table(speedup, "x")(_compared(rows)), pass_table(passes)])


SECTION = Section(
    f"Experts: grouped products of skewed routings (speed-up over {TORCH} in bf16)",
    cases=_cases,
    draw=lambda rows, path: ratio_bars(speedup, f"speed-up over {TORCH}")(_compared(rows), path),
    table=_table,
)
