"""Ground truth of every operation, in plain PyTorch: what any faster kernel must reproduce, forward and backward.

A Q-Sparse BitNet linear layer computes, for one token x and the weight matrix W (arXiv 2407.10969 eq. 4-10,
arXiv 2402.17764 sec. 2),

    s_x = max(max|x|, 1e-5) / 127           q = clamp(round(x / s_x), -128, 127)        int8 codes
    m   = 1 on the K largest |q|, else 0    ties to the lowest index, so exactly K ones
    s_w = max(mean|W|, 1e-5)                t = clamp(round(W / s_w), -1, 1)            ternary codes
    y   = s_x s_w (m q) t^T                                                             integers, scaled once

Two choices differ from the usual fake quantization, and both exist so that a run does not depend on its layout:

* Scales are rounded to float32 *before* the codes are computed from them, and the codes are what the product uses.
  The paper's 127 / max|x| in working precision meets exact .5 ties: in the first position attention copies a value
  vector, which is an integer vector times one scale, and then last-bit noise in that scale decides the rounding.
* Selection works on the codes, hence on integers.  Floating-point magnitudes would tie by noise.

The product of codes is exact: |q| <= 128, so a sum over D < 2^17 features stays below 2^24 and float32 holds it.

Shapes: T tokens, D input features, O output features, K kept features, G row groups of a fused weight.
"""

import torch
from torch import Tensor

QMAX = 127.0
EPS = 1e-5
E4M3_MAX = 448.0
_FLOAT32_EXACT_FEATURES = 2**24 // 128


def row_scale(gamma: Tensor) -> Tensor:
    """Scale of absmax int8 codes, float32, from gamma = max|x| of each row (any shape)."""
    return (gamma.double().clamp(min=EPS) / QMAX).to(torch.float32)


def absmax_codes(x_TD: Tensor, scale_T1: Tensor) -> Tensor:
    """int8 codes clamp(round(x / scale), -128, 127), half to even (arXiv 2407.10969 eq. 5).

    Args:
        x_TD: activations, any float type.
        scale_T1: float32 scale of each row, from `row_scale`.
    """
    work = torch.promote_types(x_TD.dtype, torch.float32)
    return (x_TD.to(work) / scale_T1.to(work)).round_().clamp_(-QMAX - 1, QMAX).to(torch.int8)


def magnitude_keys(values: Tensor) -> tuple[Tensor, int]:
    """Non-negative integers ordered like |values|, and the number of bits they take.

    int8 codes give |q| itself (8 bits); for floats the bit pattern without the sign is ordered like the magnitude.
    """
    if values.dtype == torch.int8:
        return values.to(torch.int16).abs_(), 8
    integer, bits = {
        torch.bfloat16: (torch.int16, 15),
        torch.float16: (torch.int16, 15),
        torch.float32: (torch.int32, 31),
        torch.float64: (torch.int64, 63),
    }[values.dtype]
    return values.abs().contiguous().view(integer), bits


def topk_mask(values_TD: Tensor, k: int) -> Tensor:
    """Bool mask of exactly `k` largest |values| of each row, ties to the lowest index (arXiv 2407.10969 eq. 2)."""
    keys, _ = magnitude_keys(values_TD)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def block_mask(values_TD: Tensor, k: int, block: int) -> Tensor:
    """Bool mask of exactly `k` of every `block` consecutive features (Block Q-Sparse, arXiv 2407.10969 sec. 2.1)."""
    return topk_mask(values_TD.unflatten(-1, (-1, block)), k).flatten(-2)


def apply_mask(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with zeros where `mask` is false, in the type of `values`."""
    return values * mask.to(values.dtype)  # int8 times bool would leave the vectorized path


def digit_histogram(keys_TD: Tensor, prefix_T1: Tensor, shift: int) -> Tensor:
    """Counts, per row, of the 8-bit digit at `shift` among keys whose higher bits equal `prefix`; int32 [T, 256]."""
    matches = (keys_TD >> (shift + 8)) == prefix_T1
    digits = ((keys_TD >> shift) & 0xFF).long()
    counts = torch.zeros(*keys_TD.shape[:-1], 256, dtype=torch.int32, device=keys_TD.device)
    return counts.scatter_add_(-1, digits, matches.int())


def absmean_sum(weight_GRD: Tensor) -> Tensor:
    """Sum of |W| in float64 (a scalar): shards add up to the same float32 scale under every layout."""
    return weight_GRD.abs().sum(dtype=torch.float64)


def absmean_scale(absolute_sum: Tensor, count: Tensor | int) -> Tensor:
    """Scale of ternary weights, float32: max(mean|W|, 1e-5) (arXiv 2402.17764 eq. 3, with BitNet's clamp)."""
    return (absolute_sum / count).clamp(min=EPS).to(torch.float32)


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 codes clamp(round(W / scale), -1, 1) (arXiv 2402.17764 eq. 1-2); `scale` broadcasts against `weight`."""
    work = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(work) / scale.to(work)).round_().clamp_(-1, 1).to(torch.int8)


def _accumulation_dtype(dtype: torch.dtype, num_terms: int, *, exact: bool) -> torch.dtype:
    """float64 for float64 results and for integer sums that float32 could not hold, else float32."""
    if dtype == torch.float64 or (exact and num_terms >= _FLOAT32_EXACT_FEATURES):
        return torch.float64
    return torch.float32


def linear(
    x_TD: Tensor, weight_OD: Tensor, *, x_scale_T1: Tensor | None, weight_scale_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = x_scale * weight_scale * (x weight^T), accumulated in float32 or wider and rounded once to `dtype`.

    Args:
        x_TD: int8 codes or floats; masked entries are zeros.
        weight_OD: int8 ternary codes or floats.
        x_scale_T1: float32 scale of each token, or None for 1.
        weight_scale_O: float32 scale of each output feature, or None for 1.
        dtype: type of the result.

    Returns:
        [T, O] in `dtype`.
    """
    exact = x_TD.dtype == weight_OD.dtype == torch.int8
    accumulate = _accumulation_dtype(dtype, x_TD.shape[-1], exact=exact)
    y_TO = torch.nn.functional.linear(x_TD.to(accumulate), weight_OD.to(accumulate))
    scale = _product(x_scale_T1, weight_scale_O, accumulate)
    return (y_TO if scale is None else y_TO.mul_(scale)).to(dtype)


def _product(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if a is None or b is None:
        one = a if b is None else b
        return None if one is None else one.to(dtype)
    return a.to(dtype) * b.to(dtype)


def linear_dgrad(grad_TO: Tensor, weight_OD: Tensor, *, weight_scale_O: Tensor | None) -> Tensor:
    """Input gradient dX = (dY weight_scale) weight, straight through mask and codes (arXiv 2407.10969 eq. 13)."""
    accumulate = _accumulation_dtype(grad_TO.dtype, 0, exact=False)
    grad = grad_TO.to(accumulate)
    if weight_scale_O is not None:
        grad = grad * weight_scale_O.to(accumulate)
    return (grad @ weight_OD.to(accumulate)).to(grad_TO.dtype)


def linear_wgrad(grad_TO: Tensor, x_TD: Tensor, *, x_scale_T1: Tensor | None) -> Tensor:
    """Weight gradient dW = (dY x_scale)^T x with the masked input that the forward multiplied; float32 or wider."""
    accumulate = _accumulation_dtype(grad_TO.dtype, 0, exact=False)
    grad = grad_TO.to(accumulate)
    if x_scale_T1 is not None:
        grad = grad * x_scale_T1.to(accumulate)
    return grad.flatten(0, -2).t() @ x_TD.to(accumulate).flatten(0, -2)


def e4m3_gradient(grad_TO: Tensor, weight_scale_O: Tensor | None) -> tuple[Tensor, Tensor]:
    """dY rounded to e4m3 with one scale per token: values and scale [T, 1], both float32 or wider.

    Scales of single output features multiply dY first; a single scale of the whole weight stays outside.
    """
    work = _accumulation_dtype(grad_TO.dtype, 0, exact=False)
    grad = grad_TO.to(work)
    if weight_scale_O is not None and weight_scale_O.numel() > 1:
        grad = grad * weight_scale_O.to(work)
    scale = grad.abs().amax(-1, keepdim=True).clamp(min=1e-30) / E4M3_MAX
    return (grad / scale).to(torch.float8_e4m3fn).to(work), scale


def e4m3_input(codes_TD: Tensor, factor_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Codes times a factor per token, rounded to e4m3, and the scale c = max factor * 127 / 448 taken out."""
    common = factor_T1.max() * (QMAX / E4M3_MAX)
    values = codes_TD.to(factor_T1.dtype) * (factor_T1 / common)
    return values.to(torch.float8_e4m3fn).to(factor_T1.dtype), common
