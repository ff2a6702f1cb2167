"""What stands around the products of grouped experts, in one pass each: SubLN with each expert's gain, and the weights.

`kernels.fused` knows one gain.  `GroupedFused` has the same operations with the gains of all experts, [E, F], so that a
`Front` made of it stands in front of grouped down projections as it does in front of a single one.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Before, Fused


class GroupedFused:
    """`kernels.dispatch.Fused` for tokens sorted by expert.

    Args:
        fused: what serves where there is no gain.
        offsets: int32 [E + 1], first row of each expert and T at the end.
    """

    def __init__(self, fused: Fused, offsets: Tensor) -> None:
        self._fused, self._offsets = fused, offsets
        self.rms_norm, self.activate, self.takes = fused.rms_norm, fused.activate, fused.takes

    def sparsify(
        self, x: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Fused.sparsify`."""
        if before.gain is None:
            return self._fused.sparsify(x, kept, block, before)
        grouped: Any = importlib.import_module("kernels.grouped_fused")
        given = {"offsets": self._offsets, "activation": before.activation, "gain_EF": before.gain, "eps": before.eps}
        return grouped.sparsify(x, kept, block, **given)

    def backward(self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Fused.backward`."""
        if before.gain is None:
            return self._fused.backward(grad, x, before, None)
        grouped: Any = importlib.import_module("kernels.grouped_fused")
        given = {"offsets": self._offsets, "activation": before.activation, "gain_EF": before.gain, "rstd": rstd}
        return grouped.backward(grad, x, **given)


def weigh(output: Tensor, probs: Tensor, fused: Fused | None) -> Tensor:
    """Outputs [T, D] times probabilities [T], in the outputs' type; one pass where `fused` says there are kernels."""
    if fused is None or output.dtype != torch.bfloat16 or probs.dtype != torch.float32:
        return (output * probs.unsqueeze(-1)).to(output.dtype)
    return _Weigh.apply(output, probs)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, probs: Tensor) -> Tensor:
        output, probs = output.contiguous(), probs.contiguous()
        ctx.save_for_backward(output, probs)
        return importlib.import_module("kernels.grouped_weight").weigh(output, probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return importlib.import_module("kernels.grouped_weight").backward(grads[0].contiguous(), *ctx.saved_tensors)
