"""Feed-forward activations of bf16 rows in one pass: relu(g)^2 u, silu(g) u, relu(u)^2.

For layers that do not quantize their input; those that do compute the activation with the quantization (`fused`).
Rounded to bf16 where a chain of torch operations rounds.  The backward is that of `fused_backward`.

Shapes: T tokens, F features; the input has 2 F columns [gate | up] with a gated activation, else F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Activation
from kernels.fused import MAX_FEATURES_ALONE, activated, check_input
from kernels.launch import cdiv, next_power_of_2

_BLOCK = 2048


@triton.jit
def _activation_kernel(x_ptr, y_ptr, row_stride, features, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = feature < features
    gate = tl.load(x_ptr + row * row_stride + feature, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if ACTIVATION != "relu2":
        up = tl.load(x_ptr + row * row_stride + features + feature, mask=mask, other=0.0).to(tl.float32)
    y = activated(gate, up, ACTIVATION)
    tl.store(y_ptr + row * features + feature, y.to(tl.bfloat16), mask=mask)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """[..., 2 F] (or [..., F] without a gate) bf16, rows contiguous -> [..., F] bf16.

    Raises:
        ValueError: an unknown activation, or types or shapes that the kernel does not take.
    """
    rows, features = check_input(x, activation, MAX_FEATURES_ALONE)
    y = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    if y.numel():
        block = min(_BLOCK, next_power_of_2(features))
        _activation_kernel[(rows.shape[0], cdiv(features, block))](
            rows, y, rows.stride(0), features, ACTIVATION=activation, BLOCK=block, num_warps=4
        )
    return y
