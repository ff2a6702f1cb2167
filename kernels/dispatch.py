"""Which kernels a linear layer runs on: the reference in plain PyTorch, or Triton's on a GPU.

Both offer the same four operations (`Kernels`, `Backward`), so the layer is written once.  The Triton set hands single
calls back to the reference where a kernel has no form for them (float32 and float64 models, matrices whose rows are
not multiples of 16 bytes); it never changes what is computed:

    forward     bit-equal
    dgrad       ternary weights in bf16 or e4m3 are exact; sums in float32 in another order
    wgrad       the input in bf16 (one more rounding), or e4m3 on request

Shapes: T tokens, D input features, O output features.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from kernels import reference

Choice = Literal["auto", "triton", "reference"]
Gather = Callable[[Tensor], Tensor]
"""From the rows of this rank to those of all ranks that share them, in rank order."""
Activation = Literal["relu2", "relu2_glu", "swiglu"]
"""Feed-forward activation in front of the down projection; the gated ones take [gate | up]."""


class Backward(Protocol):
    """The two products of a backward pass, of one gradient."""

    def dgrad(self) -> Tensor:
        """dX [..., D] in the type of dY."""

    def wgrad(self, x: Tensor, x_scale: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
        """dW [O,D], or None if it was added to `main_grad`."""


@dataclass(frozen=True)
class Expanded:
    """A ternary weight as the exact backward pass multiplies by it: dX = scale (dY values)."""

    values: Tensor
    """bf16 [O,D], exactly -1, 0 and 1, or of a weight with several scales times their ratios to the largest."""
    scale: Tensor
    """float32 [1], the largest scale."""


class Expander(Protocol):
    """Makes what exact backward passes multiply by beforehand, once for all microbatches of an optimizer step."""

    def takes(self, weight: Tensor) -> bool:
        """Whether `Kernels.backward` uses it for ternary codes of this master weight [O,D]."""

    def expand(self, codes: Tensor, scale: Tensor) -> Expanded:
        """From int8 codes [O,D] and scales [O] or [1]."""


class Packed(Protocol):
    """A ternary weight in two bits, for products of a few tokens: those of `Kernels.linear` in bf16, bit for bit."""

    def takes(self, x: Tensor) -> bool:
        """Whether there is a product for an input [..., D]."""

    def linear(self, x: Tensor, x_scale: Tensor) -> Tensor:
        """bf16 [..., O] of int8 codes [..., D] and their scales [..., 1]."""


class Packer(Protocol):
    """Makes the two-bit form of weights that stay as they are for many tokens."""

    def takes(self, weight: Tensor) -> bool:
        """Whether there is one for ternary codes of this master weight [O,D]."""

    def pack(self, codes: Tensor, scale: Tensor, num_tokens: int) -> Packed:
        """From int8 codes [O,D] and scales [O] or [1], for so many tokens at once."""


class Before(NamedTuple):
    """What is computed on a row before its codes: an activation function, an RMSNorm, both in this order, none."""

    activation: Activation | None = None
    gain: Tensor | None = None
    """[F] of the norm, bf16 or float32; None: no norm."""
    eps: float = 0.0
    """Added to the mean square."""


class Fused(Protocol):
    """What stands in front of a linear layer, in one pass; bf16 only."""

    def takes(self, features: int, block: int | None) -> bool:
        """Whether there are kernels for rows of so many features, of which blocks of `block` are sparsified."""

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Normalized rows and 1/rms [..., 1]."""

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """The activation function alone."""

    def sparsify(
        self, x: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What comes before, then as `Kernels.sparsify`; codes, scales, and 1/rms."""

    def backward(self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and gain from the gradient behind the norm (or behind the activation)."""


class Sharded(Protocol):
    """`Fused` of rows whose features are spread over ranks, between the collectives; see `kernels.sharded`."""

    def takes(self, dtype: torch.dtype, features: int, block: int | None) -> bool:
        """Whether there are kernels for the codes of rows of which this rank has `features`."""

    def row_sums(self, x: Tensor, before: Before) -> Tensor:
        """What the others have to know of this rank's features first, float32 [T, 2]."""

    def normalize(self, x: Tensor, sums: Tensor, before: Before) -> tuple[Tensor, Tensor]:
        """`Fused.rms_norm` given the sums of all ranks, [ranks, T, 2]."""

    def local_codes(
        self, x: Tensor, sums: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`Fused.sparsify` under the scale of the whole row, K and M being of this rank's features."""

    def count_codes(
        self, x: Tensor, sums: Tensor, before: Before
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
        """(All codes, scales, 1/rms), and counts of magnitudes [T, 16]."""

    def count_nearest(self, codes: Tensor, coarse: Tensor, kept: int) -> Tensor:
        """Counts of magnitudes next to the K-th largest [T, 8], given the first counts of all ranks [ranks, T, 16]."""

    def keep_largest(self, codes: Tensor, coarse: Tensor, fine: Tensor, kept: int, rank: int) -> Tensor:
        """Mask the codes in place, given both counts of all ranks [ranks, T, 16] and [ranks, T, 8]."""

    def gradient_dots(self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor) -> Tensor:
        """What the gradient of the norm sums over the features of the row, float32 [..., 1]."""

    def gradients(
        self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor, dots: Tensor, num_features: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and gain, given the sum over ranks."""


class Kernels(Protocol):
    """What a linear layer computes with."""

    fused: Fused | None
    """Forms fused with what precedes the layer; None: there are none."""
    sharded: Sharded | None
    """Passes of a row-parallel layer on several ranks; None: there are none."""
    expander: Expander | None
    """What keeps ternary weights in bf16 for the backward pass; None: nothing does."""
    packer: Packer | None
    """What packs ternary weights for decoding; None: nothing does."""

    def sparsify(self, x: Tensor, kept: int | None, block: int | None) -> tuple[Tensor, Tensor]:
        """int8 codes of the `kept` largest features (of each `block`; None: of the row) and scales [..., 1]."""

    def largest(self, x: Tensor, kept: int, block: int | None) -> Tensor:
        """`x` with all but the `kept` largest features (of each `block`; None: of the row) set to 0."""

    def linear(
        self, x: Tensor, weight: Tensor, *, x_scale: Tensor | None, weight_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x_scale weight_scale (x weight^T); scales [..., 1] and [O] or [1], None for 1."""

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
        """The backward products of dY [..., O]; with `e4m3` dY is rounded to 8 bits first.

        `expanded` is what the `expander` made of the weight and changes no bit of the results; neither does whether
        dY holds all tokens or those of this rank and `gather` the others, but gradients in e4m3 travel as such.
        """


def kernels_for(device: torch.device | str, choice: Choice = "auto", *, keep_bf16_weights: bool = False) -> Kernels:
    """The kernels for tensors on `device`; `auto`: Triton's on a GPU.

    Args:
        device: where the tensors are.
        choice: which kernels.
        keep_bf16_weights: Triton's offer an `Expander`; the reference multiplies by the codes and needs none.

    Raises:
        ValueError: Triton is asked for and this is no GPU, or Triton is not installed.
    """
    is_gpu = torch.device(device).type == "cuda"
    if choice == "reference" or (choice == "auto" and not is_gpu):
        return ReferenceKernels()
    if not is_gpu:
        raise ValueError(f"run.kernels=triton needs a GPU, this run is on {device}: use run.kernels=auto")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed: pip install triton, or set run.kernels=reference (slow)")
    return importlib.import_module("kernels.triton_kernels").TritonKernels(keep_bf16_weights=keep_bf16_weights)


class ReferenceKernels:
    """The ground truth, for CPUs, for float64, and to compare with."""

    fused: Fused | None = None
    sharded: Sharded | None = None
    expander: Expander | None = None
    packer: Packer | None = None

    def sparsify(self, x: Tensor, kept: int | None, block: int | None) -> tuple[Tensor, Tensor]:
        """See `Kernels.sparsify`."""
        scale = reference.row_scale(x.abs().amax(-1, keepdim=True))
        codes = reference.absmax_codes(x, scale)
        if kept is None:
            return codes, scale
        return self.largest(codes, kept, block), scale

    def largest(self, x: Tensor, kept: int, block: int | None) -> Tensor:
        """See `Kernels.largest`."""
        mask = reference.topk_mask(x, kept) if block is None else reference.block_mask(x, kept, block)
        return reference.apply_mask(x, mask)

    def linear(
        self, x: Tensor, weight: Tensor, *, x_scale: Tensor | None, weight_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `Kernels.linear`."""
        if x.is_cuda and x_scale is None and weight_scale is None and x.dtype == weight.dtype == dtype:
            return dense_linear(x, weight)
        return reference.linear(x, weight, x_scale_T1=x_scale, weight_scale_O=weight_scale, dtype=dtype)

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
        """See `Kernels.backward`; multiplies by the codes in any case."""
        grad = grad if gather is None else gather(grad)
        if not e4m3:
            return ReferenceBackward(grad, weight, weight_scale)
        return ReferenceE4M3Backward(grad, weight, weight_scale, e4m3_scale(weight, x_scale))


def e4m3_scale(weight: Tensor, x_scale: Tensor | None) -> Tensor:
    """`x_scale` of operands that have a backward pass in e4m3.

    Raises:
        ValueError: the weight or the input is not codes.
    """
    if x_scale is None or weight.dtype != torch.int8:
        raise ValueError("gradients=e4m3 needs weights=ternary and activations=int8")
    return x_scale


class ReferenceBackward:
    """Both products in float32 or wider."""

    def __init__(self, grad: Tensor, weight: Tensor, weight_scale: Tensor | None) -> None:
        self._grad, self._weight, self._weight_scale = grad, weight, weight_scale

    def dgrad(self) -> Tensor:
        """See `Backward.dgrad`."""
        return reference.linear_dgrad(self._grad, self._weight, weight_scale_O=self._weight_scale)

    def wgrad(self, x: Tensor, x_scale: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
        """See `Backward.wgrad`."""
        dw = reference.linear_wgrad(self._grad, x, x_scale_T1=x_scale)
        if main_grad is None:
            return dw
        main_grad.add_(dw)
        return None


class ReferenceE4M3Backward:
    """Both products of a gradient rounded to e4m3, as `kernels.gradients` defines them, in float32 or wider."""

    def __init__(self, grad: Tensor, weight: Tensor, weight_scale: Tensor | None, x_scale: Tensor) -> None:
        self._dtype, self._shape = grad.dtype, grad.shape
        self._weight, self._weight_scale = weight, weight_scale
        self._codes, self._scale = reference.e4m3_gradient(grad.flatten(0, -2), weight_scale)
        self._x_scale = x_scale.flatten()[:, None].to(self._scale.dtype)

    def dgrad(self) -> Tensor:
        """See `Backward.dgrad`."""
        dx = self._scale * (self._codes @ self._weight.to(self._codes.dtype))
        if self._weight_scale is not None and self._weight_scale.numel() == 1:
            dx = dx * self._weight_scale
        return dx.to(self._dtype).view(*self._shape[:-1], self._weight.shape[1])

    def wgrad(self, x: Tensor, x_scale: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
        """See `Backward.wgrad`; `x_scale` is the one given before."""
        codes, common = reference.e4m3_input(x.flatten(0, -2), self._x_scale * self._scale)
        dw = common * (self._codes.t() @ codes)
        if self._weight_scale is not None and self._weight_scale.numel() > 1:
            dw = dw / self._weight_scale[:, None]
        if main_grad is None:
            return dw
        main_grad.add_(dw)
        return None
