"""The rivals of a Q-Sparse BitNet layer: what training code for such models usually does, and 8-bit linear layers.

The usual code (arXiv 2407.10969 sec. 2, the training tips to arXiv 2402.17764) is an ordinary linear layer around

    x + (topk(q(x)) - x).detach()        w + (t(w) - w).detach()

a chain of elementwise operations, one `topk` and one `scatter` in bf16, for autograd or for torch.compile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Layer = Callable[[Tensor], Tensor]


def fake_quantize_input(x: Tensor, kept: int | None, block: int | None = None) -> Tensor:
    """Absmax int8 values of the largest features, dequantized; straight-through.

    Args:
        x: [T, D].
        kept: features kept of the row (of every `block` of them); None: all.
        block: features per block.
    """
    scale = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    quantized = (x * scale).round().clamp(-128, 127) / scale
    if kept is not None:
        rows = quantized if block is None else quantized.unflatten(-1, (-1, block))
        index = rows.abs().topk(kept, dim=-1).indices
        mask = torch.zeros_like(rows).scatter_(-1, index, 1.0)
        quantized = (rows * mask).view_as(x)
    return x + (quantized - x).detach()


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Absmean ternary values, dequantized; straight-through."""
    scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
    return weight + ((weight * scale).round().clamp(-1, 1) / scale - weight).detach()


def naive_linear(x: Tensor, weight: Tensor, kept: int) -> Tensor:
    """The layer [T, D] x [O, D] -> [T, O]."""
    return linear(fake_quantize_input(x, kept), fake_quantize_weight(weight))


def transformer_engine_fp8(weight: Tensor) -> tuple[Layer, Tensor]:
    """Transformer Engine's FP8 linear layer (delayed scaling), its FP8 weight kept between calls; and its parameter.

    Raises:
        ImportError: it is not installed.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Format

    features_out, features_in = weight.shape
    layer = te.Linear(features_in, features_out, bias=False, params_dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, amax_compute_algo="max")
    autocast = getattr(te, "autocast", None) or te.fp8_autocast
    is_first = True

    def run(x: Tensor) -> Tensor:
        nonlocal is_first
        with autocast(True, False, recipe):
            y: Tensor = layer(x, is_first_microbatch=is_first)
        is_first = False
        return y

    return run, layer.weight


def torchao_bitnet(weight: Tensor) -> tuple[Layer, Tensor]:
    """torchao's BitNet b1.58 training layer: int8 activations, ternary weights, no sparsity, bf16 gradients.

    Raises:
        ImportError: it is not installed, or has no such prototype any more.
    """
    from torchao.prototype.quantized_training import bitnet_training

    return _torchao_layer(weight, bitnet_training())


def torchao_int8(weight: Tensor) -> tuple[Layer, Tensor]:
    """torchao's INT8 mixed-precision training layer: all three products in int8, scales per row and column.

    Raises:
        ImportError: as `torchao_bitnet`.
    """
    from torchao.prototype.quantized_training import int8_mixed_precision_training

    return _torchao_layer(weight, int8_mixed_precision_training())


def _torchao_layer(weight: Tensor, config: Any) -> tuple[Layer, Tensor]:
    """A linear layer as `config` converts it, compiled as its authors say; and its parameter."""
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    quantize_(layer, config)
    return torch.compile(layer, dynamic=False), layer.weight
