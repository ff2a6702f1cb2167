"""The usual training code for BitNet and Q-Sparse in place of this project's layers: fake quantization in bf16.

Each linear layer multiplies dequantized values, x + (topk(q(x)) - x).detach() and w + (t(w) - w).detach()
(`pipeline.bench.kernels.naive`), differentiated by autograd.  All else is the model's: norms, attention, loss and
optimizer.
"""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from kernels.dispatch import ReferenceKernels
from pipeline.bench.kernels.naive import fake_quantize_input, fake_quantize_weight
from pipeline.model import Model


def use_fake_quantization(model: Model, sparsity: float, *, compiled: bool) -> None:
    """Let the linear layers of a dense model compute so; on one process, whose weights are whole.

    Args:
        model: with every layer dense, SubLN included where the format has it.
        sparsity: share of each layer's input features that is zero.
        compiled: torch.compile will see the layers.  It makes one kernel of a norm in plain PyTorch and what follows,
            which is faster than this project's fused norm and what follows; uncompiled, the fused norm is faster.
    """
    for layer in model.layers:
        if compiled:
            setattr(layer.module, "kernels", ReferenceKernels())  # noqa: B010
        kept = int((1 - sparsity) * layer.module.weight.shape[1]) if sparsity else None
        # megatron-core's layers do their product through this method.
        setattr(layer.module, "_forward_impl", partial(_product, kept=kept))  # noqa: B010


def _product(input: Tensor, weight: Tensor, *_: Any, kept: int | None, **__: Any) -> Tensor:
    return linear(fake_quantize_input(input, kept), fake_quantize_weight(weight))
