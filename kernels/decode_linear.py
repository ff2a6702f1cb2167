"""`dispatch.Packer` in Triton: a layer's product for one to sixteen tokens, on the kernel that suits their number."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.decode import MAX_FEATURES, MAX_TOKENS, Workspace, ternary_dot, ternary_gemv
from kernels.packing import pack_ternary

GEMV_TOKENS = 2
"""From three tokens on `ternary_dot` is faster at any sparsity (docs/performance.md)."""


class TwoBitWeight:
    """`dispatch.Packed`.

    Args:
        codes: int8 [O,D].
        scale: float32 [O] or [1].
        num_tokens: that will come at once.
    """

    def __init__(self, codes: Tensor, scale: Tensor, num_tokens: int) -> None:
        few = num_tokens <= GEMV_TOKENS
        self._most = GEMV_TOKENS if few else MAX_TOKENS
        product: Callable[..., Tensor] = ternary_gemv if few else ternary_dot
        weight = pack_ternary(codes, layout="column" if few else "row")
        workspace = Workspace.allocate(codes.device, num_sums=self._most * len(codes), num_arrivals=0)
        rows = scale.expand(len(codes)).contiguous()
        self._product = partial(product, weight=weight, weight_scale_O=rows, workspace=workspace)

    def takes(self, x: Tensor) -> bool:
        """See `Packed.takes`."""
        return x.dtype == torch.int8 and 0 < x[..., 0].numel() <= self._most

    def linear(self, x: Tensor, x_scale: Tensor) -> Tensor:
        """See `Packed.linear`."""
        y_TO = self._product(x.flatten(0, -2), x_scale_T1=x_scale.view(-1, 1))
        return y_TO.view(*x.shape[:-1], y_TO.shape[1])


class TwoBitPacker:
    """`dispatch.Packer`."""

    def takes(self, weight: Tensor) -> bool:
        """See `Packer.takes`."""
        return weight.dtype == torch.bfloat16 and weight.shape[1] <= MAX_FEATURES

    def pack(self, codes: Tensor, scale: Tensor, num_tokens: int) -> TwoBitWeight:
        """See `Packer.pack`."""
        return TwoBitWeight(codes, scale, num_tokens)
