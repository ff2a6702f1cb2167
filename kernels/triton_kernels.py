"""`dispatch.Kernels` on a GPU: which Triton kernels make up each operation, and when the reference steps in."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from kernels import fused, fused_backward, gradients, sharded, sharded_backward, topk_float
from kernels.activation import activate
from kernels.decode_linear import TwoBitPacker
from kernels.dispatch import (
    Activation,
    Backward,
    Before,
    Expanded,
    Expander,
    Fused,
    Gather,
    Packer,
    ReferenceKernels,
    Sharded,
    e4m3_scale,
)
from kernels.gemm import gemm, unaligned
from kernels.norm import rms_norm
from kernels.sparsify import MAX_BLOCK, MAX_FEATURES, sparsify


class TritonKernels:
    """Fast forms of every operation for bf16 models; anything else goes to the reference.

    Args:
        keep_bf16_weights: offer an `Expander`.
    """

    def __init__(self, *, keep_bf16_weights: bool = False) -> None:
        self._reference = ReferenceKernels()
        self.fused: Fused | None = FusedKernels()
        self.sharded: Sharded | None = ShardedKernels()
        self.expander: Expander | None = WeightExpander() if keep_bf16_weights else None
        self.packer: Packer | None = TwoBitPacker()

    def sparsify(self, x: Tensor, kept: int | None, block: int | None) -> tuple[Tensor, Tensor]:
        """See `Kernels.sparsify`."""
        if x.dtype == torch.float64 or x.shape[-1] > MAX_FEATURES or (block is not None and block > MAX_BLOCK):
            return self._reference.sparsify(x, kept, block)
        return sparsify(_rows(x), kept, block)

    def largest(self, x: Tensor, kept: int, block: int | None) -> Tensor:
        """See `Kernels.largest`."""
        fits = x.dtype in topk_float.DTYPES and x.shape[-1] <= topk_float.MAX_FEATURES
        if not fits or (block is not None and not 1 < block <= MAX_BLOCK):
            return self._reference.largest(x, kept, block)
        return topk_float.largest(_rows(x), kept, block)

    def linear(
        self, x: Tensor, weight: Tensor, *, x_scale: Tensor | None, weight_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `Kernels.linear`."""
        if dtype != torch.bfloat16 or not _fits(weight):
            return self._reference.linear(x, weight, x_scale=x_scale, weight_scale=weight_scale, dtype=dtype)
        if x_scale is None and weight_scale is None:
            return dense_linear(x, weight)
        rows = x.flatten(0, -2)
        if x.dtype != torch.int8 or weight.dtype != torch.int8:
            rows, weight = _bf16(rows), _bf16(weight)
        y_TO = gemm(rows, weight, a_scale=None if x_scale is None else x_scale.flatten(), b_scale=weight_scale)
        return y_TO.view(*x.shape[:-1], weight.shape[0])

    def backward(
        self,
        grad: Tensor,
        weight: Tensor,
        *,
        weight_scale: Tensor | None,
        x_scale: Tensor | None,
        e4m3: bool,
        expanded: Expanded | None = None,
        gather: Gather | None = None,
    ) -> Backward:
        """See `Kernels.backward`."""
        if grad.dtype != torch.bfloat16 or not _fits(weight) or unaligned(grad.flatten(0, -2)):
            return self._reference.backward(
                grad, weight, weight_scale=weight_scale, x_scale=x_scale, e4m3=e4m3, gather=gather
            )
        if e4m3:
            return FastBackward(grad, weight, weight_scale, e4m3_scale(weight, x_scale), gather)
        return ExactBackward(grad if gather is None else gather(grad), weight, weight_scale, expanded)


class FusedKernels:
    """`dispatch.Fused` in Triton."""

    def takes(self, features: int, block: int | None) -> bool:
        """See `Fused.takes`."""
        return _fits_one_pass(features, block)

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Fused.rms_norm`."""
        return rms_norm(_rows(x), gain, eps)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """See `Fused.activate`."""
        return activate(_rows(x), activation)

    def sparsify(
        self, x: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Fused.sparsify`."""
        return fused.sparsify(_rows(x), kept, block, **before._asdict())

    def backward(self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Fused.backward`."""
        rows = _rows(grad), _rows(x)
        return fused_backward.backward(*rows, activation=before.activation, gain=before.gain, rstd=rstd)


class ShardedKernels:
    """`dispatch.Sharded` in Triton."""

    def takes(self, dtype: torch.dtype, features: int, block: int | None) -> bool:
        """See `Sharded.takes`."""
        return dtype != torch.float64 and _fits_one_pass(features, block)

    def row_sums(self, x: Tensor, before: Before) -> Tensor:
        """See `Sharded.row_sums`."""
        return sharded.row_sums(_rows(x), before)

    def normalize(self, x: Tensor, sums: Tensor, before: Before) -> tuple[Tensor, Tensor]:
        """See `Sharded.normalize`."""
        return sharded.normalize(_rows(x), sums, before)

    def local_codes(
        self, x: Tensor, sums: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Sharded.local_codes`."""
        return sharded.local_codes(_rows(x), sums, kept, block, before)

    def count_codes(
        self, x: Tensor, sums: Tensor, before: Before
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
        """See `Sharded.count_codes`."""
        return sharded.count_codes(_rows(x), sums, before)

    def count_nearest(self, codes: Tensor, coarse: Tensor, kept: int) -> Tensor:
        """See `Sharded.count_nearest`."""
        return sharded.count_nearest(codes, coarse, kept)

    def keep_largest(self, codes: Tensor, coarse: Tensor, fine: Tensor, kept: int, rank: int) -> Tensor:
        """See `Sharded.keep_largest`."""
        return sharded.keep_largest(codes, coarse, fine, kept, rank)

    def gradient_dots(self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor) -> Tensor:
        """See `Sharded.gradient_dots`."""
        return sharded_backward.gradient_dots(_rows(grad), _rows(x), before, rstd)

    def gradients(
        self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor, dots: Tensor, num_features: int
    ) -> tuple[Tensor, Tensor]:
        """See `Sharded.gradients`."""
        return sharded_backward.gradients(_rows(grad), _rows(x), before, rstd, dots, num_features)


class WeightExpander:
    """`dispatch.Expander` in Triton.

    A weight with several scales is multiplied as their ratios to the largest: these are rounded to bf16 (2^-9), where
    a single scale stays outside the product in float32.
    """

    def takes(self, weight: Tensor) -> bool:
        """See `Expander.takes`."""
        return _fits(weight)

    def expand(self, codes: Tensor, scale: Tensor) -> Expanded:
        """See `Expander.expand`."""
        if scale.numel() == 1:
            return Expanded(_bf16(codes), scale)
        largest = scale.max().view(1)
        return Expanded(gradients.dequantize(codes, scale / largest), largest)


class ExactBackward:
    """Both products in bf16 with float32 sums; codes without their `expanded` form are brought to it first."""

    def __init__(
        self, grad: Tensor, weight: Tensor, weight_scale: Tensor | None, expanded: Expanded | None = None
    ) -> None:
        self._grad, self._weight, self._weight_scale, self._expanded = grad, weight, weight_scale, expanded

    def dgrad(self) -> Tensor:
        """See `Backward.dgrad`."""
        grad, weight, scale = self._grad.flatten(0, -2), self._weight, self._weight_scale
        if scale is None:
            dx = grad @ _bf16(weight)
        else:
            operand = self._expanded or WeightExpander().expand(weight, scale)
            dx = gemm(grad, operand.values, b_k_major=False, b_scale=operand.scale)
        return dx.view(*self._grad.shape[:-1], weight.shape[1])

    def wgrad(self, x: Tensor, x_scale: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
        """See `Backward.wgrad`."""
        rows = x.flatten(0, -2)
        if rows.dtype == torch.int8:
            rows = gradients.dequantize(rows, None if x_scale is None else x_scale.flatten())
        elif x_scale is not None:
            rows = (rows * x_scale.flatten()[:, None]).to(self._grad.dtype)
        grad_OT = self._grad.flatten(0, -2).t()
        if main_grad is None:
            return grad_OT @ rows
        torch.addmm(main_grad, grad_OT, rows, out_dtype=main_grad.dtype, out=main_grad)
        return None


class FastBackward:
    """Both products in e4m3; see `kernels.gradients`."""

    def __init__(
        self,
        grad: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        x_scale: Tensor,
        gather: Gather | None = None,
    ) -> None:
        self._shape, self._weight, self._x_scale = grad.shape, weight, x_scale.flatten()
        several = weight_scale is not None and weight_scale.numel() > 1
        self._outside = None if several else weight_scale
        self._inside = weight_scale if several else None
        self._grad = gradients.quantize_gradient(grad.flatten(0, -2), self._x_scale, self._inside, gather)

    def dgrad(self) -> Tensor:
        """See `Backward.dgrad`."""
        weight_DO = gradients.transposed_weight(self._weight)
        dx = gemm(self._grad.codes_TO, weight_DO, a_scale=self._grad.scale_T1, b_scale=self._outside)
        return dx.view(-1, *self._shape[1:-1], self._weight.shape[1])

    def wgrad(self, x: Tensor, x_scale: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
        """See `Backward.wgrad`; `x_scale` is the one given before."""
        x_DT = gradients.transposed_input(x.flatten(0, -2), self._x_scale, self._grad)
        inverse = None if self._inside is None else 1.0 / self._inside
        product = partial(gemm, self._grad.transposed_OT, x_DT, a_scale=inverse, b_scale=self._grad.common)
        if main_grad is None:
            return product()
        if unaligned(main_grad):
            main_grad.add_(product(dtype=torch.float32))
        else:
            product(out=main_grad)
        return None


def _rows(x: Tensor) -> Tensor:
    """`x` so that one stride reaches all its rows."""
    return x if x.stride(-1) == 1 and (x.dim() <= 2 or x.is_contiguous()) else x.contiguous()


def _fits_one_pass(features: int, block: int | None) -> bool:
    return features <= fused.MAX_FEATURES and (block is None or (1 < block <= MAX_BLOCK and features % block == 0))


def _fits(weight: Tensor) -> bool:
    """Both dimensions of [O,D] are multiples of 16: every operand's rows are then multiples of 16 bytes."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and weight.dtype in (torch.int8, torch.bfloat16)


def _bf16(operand: Tensor) -> Tensor:
    """Codes are exact in bf16."""
    return gradients.dequantize(operand, None) if operand.dtype == torch.int8 else operand
