"""RMSNorm of bf16 rows in one pass: y = x gain / sqrt(mean(x^2) + eps), float32 inside, rounded once.

What torch does in six passes for `qsparse_layers.norm.rms_norm`.  The backward is that of `fused_backward`.

Shapes: T tokens, D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import MAX_FEATURES, check_gain
from kernels.launch import check_rows, next_power_of_2


@triton.jit
def _rms_norm_kernel(x_ptr, gain_ptr, y_ptr, rstd_ptr, row_stride, features, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    mask = feature < features
    x = tl.load(x_ptr + row * row_stride + feature, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / features + eps)
    tl.store(rstd_ptr + row, rstd)
    gain = tl.load(gain_ptr + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * features + feature, (x * gain * rstd).to(tl.bfloat16), mask=mask)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalized rows and 1/rms.

    Args:
        x: [..., D] bf16, rows contiguous.
        gain: [D] bf16 or float32.
        eps: added to the mean square.

    Returns:
        y [..., D] bf16 and 1/rms [..., 1] float32.

    Raises:
        ValueError: types or shapes that the kernel does not take.
    """
    rows = check_rows(x, "x", MAX_FEATURES, (torch.bfloat16,))
    features = rows.shape[1]
    check_gain(gain, features)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if y.numel():
        block = next_power_of_2(features)
        _rms_norm_kernel[(rows.shape[0],)](
            rows, gain, y, rstd, rows.stride(0), features, eps, BLOCK=block, num_warps=max(1, min(16, block // 512))
        )
    return y, rstd
