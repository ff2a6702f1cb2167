"""Outputs of experts times the router's probabilities, one pass forward and one backward.

    out[t] = y[t] p[t]            dy[t] = g[t] p[t]            dp[t] = sum over features of g[t] y[t]

The product is taken in float32 and rounded once, as torch does it for bf16 times float32.  Torch's chain writes the
product, its gradient and the products of the sum in float32: 46 bytes per element where 10 have to move.

Shapes: T tokens, D features.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tile_launch import check_same_device, check_tensor, stored_dtype

_CHUNK = 2048


@triton.jit
def _weigh_kernel(y_ptr, probs_T, out_ptr, features, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    y = tl.load(y_ptr + token * features + column, mask=mask, other=0.0).to(tl.float32)
    out = y * tl.load(probs_T + token)
    tl.store(out_ptr + token * features + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(grad_ptr, y_ptr, probs_T, dy_ptr, dprobs_T, features, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs_T + token)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < features
        grad = tl.load(grad_ptr + token * features + column, mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(y_ptr + token * features + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dy_ptr + token * features + column, (grad * prob).to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(dprobs_T + token, tl.sum(total, 0))


def weigh(y_TD: Tensor, probs_T: Tensor) -> Tensor:
    """y p in y's type.

    Args:
        y_TD: bf16.
        probs_T: float32.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    T, D = _check(y_TD, probs_T)
    out = torch.empty(T, D, dtype=stored_dtype(y_TD.dtype), device=y_TD.device)
    if out.numel():
        block = min(_CHUNK, triton.next_power_of_2(D))
        _weigh_kernel[(T, triton.cdiv(D, block))](y_TD, probs_T, out, D, BLOCK=block, num_warps=4)
    return out.to(y_TD.dtype)


def backward(grad_TD: Tensor, y_TD: Tensor, probs_T: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both factors of `weigh`.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    T, D = _check(y_TD, probs_T)
    check_tensor("grad_TD", grad_TD, dtype=torch.bfloat16, shape=(T, D))
    dy = torch.empty(T, D, dtype=stored_dtype(y_TD.dtype), device=y_TD.device)
    dprobs = torch.empty(T, dtype=torch.float32, device=y_TD.device)
    if dy.numel():
        block = min(_CHUNK, triton.next_power_of_2(D))
        _backward_kernel[(T,)](grad_TD, y_TD, probs_T, dy, dprobs, D, BLOCK=block, num_warps=4)
    return dy.to(y_TD.dtype), dprobs


def _check(y_TD: Tensor, probs_T: Tensor) -> tuple[int, int]:
    check_tensor("y_TD", y_TD, dtype=torch.bfloat16, shape=(None, None))
    check_tensor("probs_T", probs_T, dtype=torch.float32, shape=(y_TD.shape[0],))
    check_same_device(y_TD=y_TD, probs_T=probs_T)
    T, D = y_TD.shape
    return T, D
