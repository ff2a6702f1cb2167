"""The grouped products of a linear layer's experts: Triton's on a GPU, a loop over experts elsewhere.

    forward   y[t] = s_x[t] s_w[e] (q[t] w[e]^T)         dX[t] = s_w[e] (dY[t] w[e])         dW[e] = sum_t dY[t]^T x[t]

Both sets have the same two operations (`GroupedProducts`), as `kernels.dispatch.Kernels` has for one layer.  The loop
is made of these kernels, so it computes what the experts would compute one after the other, bit for bit; the Triton set
differs in the order of float sums and rounds dX and the inputs of dW to bf16.

Shapes: T tokens sorted by expert, E experts, D input features, O output features, P parts of a weight (gate and up: 2).
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.dispatch import Kernels, ReferenceKernels
from kernels.gradient_table import GradientTable
from qsparse_layers.linear_call import Codes


@dataclass(frozen=True)
class StackedWeights:
    """Ternary codes of all experts of a rank."""

    codes: Tensor
    """int8 [E, O, D]."""
    scale: Tensor
    """float32 [E, O], a scale of each row, or [E, 1] where each matrix has one."""
    expanded: Tensor | None = None
    """The codes in bf16, where exact backward passes find them ready."""

    @classmethod
    def of(cls, operands: list[tuple[Tensor, Tensor | None]]) -> "StackedWeights":
        """From (codes [O, D], scale [1] or [O, 1]) of each expert."""
        scales = [scale.flatten() for _, scale in operands if scale is not None]
        return cls(torch.stack([codes for codes, _ in operands]), torch.stack(scales))

    def scale_of_parts(self, num_parts: int) -> Tensor:
        """[E, P] for weights whose rows form `num_parts` equal ranges of one scale each."""
        if self.scale.shape[1] == 1:
            return self.scale
        return self.scale.unflatten(1, (num_parts, -1))[:, :, 0].contiguous()


class GroupedProducts(Protocol):
    """What `moe.grouped` computes with."""

    def expand(self, weight: StackedWeights) -> Tensor | None:
        """`StackedWeights.expanded`, if the kernels of single layers keep such copies and these products use it."""

    def forward(self, x: Codes, weight: StackedWeights, offsets: Tensor, *, dtype: torch.dtype) -> Tensor:
        """[T, O] in `dtype`; offsets int32 [E + 1]."""

    def backward(
        self,
        grad: Tensor,
        x: Codes,
        weight: StackedWeights,
        offsets: Tensor,
        *,
        e4m3: bool,
        main_grads: GradientTable | None,
    ) -> tuple[Tensor, Tensor | None]:
        """dX [T, D] in the type of dY, and dW [E, O, D] in float32 or wider; None if it was added to `main_grads`."""


def grouped_products_for(kernels: Kernels) -> GroupedProducts:
    """The grouped products that go with the kernels of single layers."""
    return LoopedProducts(kernels) if isinstance(kernels, ReferenceKernels) else TritonProducts(kernels)


class LoopedProducts:
    """One product per expert."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def expand(self, weight: StackedWeights) -> Tensor | None:
        """See `GroupedProducts.expand`."""
        return None

    def forward(self, x: Codes, weight: StackedWeights, offsets: Tensor, *, dtype: torch.dtype) -> Tensor:
        """See `GroupedProducts.forward`."""
        parts = [
            self._kernels.linear(x.values[rows], codes_OD, x_scale=x.scale[rows], weight_scale=scale, dtype=dtype)
            for rows, codes_OD, scale in zip(_rows(offsets), weight.codes, weight.scale, strict=True)
        ]
        return torch.cat(parts)

    def backward(
        self,
        grad: Tensor,
        x: Codes,
        weight: StackedWeights,
        offsets: Tensor,
        *,
        e4m3: bool,
        main_grads: GradientTable | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `GroupedProducts.backward`."""
        dxs, dws = [], []
        targets: Sequence[Tensor | None] = main_grads.buffers if main_grads else [None] * len(weight.codes)
        for rows, codes_OD, scale, target in zip(_rows(offsets), weight.codes, weight.scale, targets, strict=True):
            products = self._kernels.backward(
                grad[rows], codes_OD, weight_scale=scale, x_scale=x.scale[rows], e4m3=e4m3 and rows.start < rows.stop
            )
            dxs.append(products.dgrad())
            dws.append(products.wgrad(x.values[rows], x.scale[rows], target))
        return torch.cat(dxs), None if main_grads else torch.stack(dws)  # type: ignore[arg-type]


class TritonProducts:
    """One launch per product, for bf16 models whose matrices have rows of a multiple of 16 codes."""

    def __init__(self, kernels: Kernels) -> None:
        self._looped = LoopedProducts(kernels)
        self._keeps_bf16 = kernels.expander is not None

    def expand(self, weight: StackedWeights) -> Tensor | None:
        """See `GroupedProducts.expand`."""
        return _expanded(weight) if self._keeps_bf16 and _fits_backward(weight, e4m3=False) else None

    def forward(self, x: Codes, weight: StackedWeights, offsets: Tensor, *, dtype: torch.dtype) -> Tensor:
        """See `GroupedProducts.forward`."""
        if dtype != torch.bfloat16 or not _fits(weight):
            return self._looped.forward(x, weight, offsets, dtype=dtype)
        gemm = importlib.import_module("kernels.grouped_gemm")
        return gemm.grouped_forward(
            x.values, weight.codes, offsets, x_scale_T=x.scale.flatten(), weight_scale_EP=_part_scales(weight)
        )

    def backward(
        self,
        grad: Tensor,
        x: Codes,
        weight: StackedWeights,
        offsets: Tensor,
        *,
        e4m3: bool,
        main_grads: GradientTable | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `GroupedProducts.backward`."""
        if grad.dtype != torch.bfloat16 or not _fits_backward(weight, e4m3=e4m3):
            return self._looped.backward(grad, x, weight, offsets, e4m3=e4m3, main_grads=main_grads)
        backward = _fast_backward if e4m3 else _exact_backward
        return backward(grad, x, weight, offsets, main_grads)


def _exact_backward(
    grad: Tensor, x: Codes, weight: StackedWeights, offsets: Tensor, main_grads: GradientTable | None
) -> tuple[Tensor, Tensor | None]:
    gemm: Any = importlib.import_module("kernels.grouped_gemm")
    gradients: Any = importlib.import_module("kernels.gradients")
    wgrad: Any = importlib.import_module("kernels.grouped_wgrad")
    weight_bf16 = _expanded(weight) if weight.expanded is None else weight.expanded
    dx = gemm.grouped_dgrad(grad, weight_bf16, offsets, weight_scale_EP=_part_scales(weight))
    x_bf16 = gradients.dequantize(x.values, x.scale.flatten())
    return dx, wgrad.grouped_wgrad(grad, x_bf16, offsets, main_grads=main_grads)


def _expanded(weight: StackedWeights) -> Tensor:
    gradients: Any = importlib.import_module("kernels.gradients")
    expanded: Tensor = gradients.dequantize(weight.codes.flatten(0, 1), None).view_as(weight.codes)
    return expanded


def _fast_backward(
    grad: Tensor, x: Codes, weight: StackedWeights, offsets: Tensor, main_grads: GradientTable | None
) -> tuple[Tensor, Tensor | None]:
    gemm: Any = importlib.import_module("kernels.grouped_gemm")
    eight_bit: Any = importlib.import_module("kernels.grouped_gradients")
    wgrad: Any = importlib.import_module("kernels.grouped_wgrad")
    x_scale_T, scale_EP = x.scale.flatten(), _part_scales(weight)
    codes = eight_bit.quantize_gradient(grad, offsets, x_scale_T=x_scale_T, weight_scale_EP=scale_EP)
    dx = gemm.grouped_dgrad_fp8(
        codes.codes_TO, eight_bit.transposed_weight(weight.codes), offsets, grad_scale_T=codes.scale_T
    )
    x_DT = eight_bit.transposed_input(x.values, x_scale_T, codes)
    return dx, wgrad.grouped_wgrad_fp8(
        codes.transposed_OT, x_DT, codes.padded_offsets, scale_EP=codes.wgrad_scale_EP, main_grads=main_grads
    )


def _part_scales(weight: StackedWeights) -> Tensor:
    """[E, P]: experts' weights are one matrix, or gate and up of equal size."""
    return weight.scale_of_parts(2)


def _fits(weight: StackedWeights) -> bool:
    """Rows of every operand are multiples of 16 bytes."""
    return weight.codes.shape[1] % 16 == 0 and weight.codes.shape[2] % 16 == 0


def _fits_backward(weight: StackedWeights, *, e4m3: bool) -> bool:
    """Also: where dX is summed over two parts of the weight, each is a whole number of steps of 64 bf16 values."""
    return _fits(weight) and (e4m3 or weight.scale.shape[1] == 1 or weight.codes.shape[1] % 128 == 0)


def _rows(offsets: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(offsets.tolist())]
