"""Forward and backward of the linear layer against an oracle written here, straight from the papers' equations.

fp64, every pattern and format.  The oracle follows arXiv 2407.10969 eq. 4-13 and arXiv 2402.17764 eq. 1-3 with one
addition of ours, stated in docs/numerics.md: scales are float32 numbers.
"""

import itertools

import pytest
import torch
from torch import Tensor

from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import LinearCall, WeightParts


def round_clip(x: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(torch.maximum(torch.round(x), torch.tensor(low)), torch.tensor(high))


def oracle_mask(magnitude: Tensor, keep: int) -> Tensor:
    """Keep the `keep` largest of each row, ties to the lowest index: by a plain Python sort."""
    mask = torch.zeros_like(magnitude)
    for row, out in zip(magnitude.reshape(-1, magnitude.shape[-1]), mask.view(-1, mask.shape[-1]), strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
        out[order[:keep]] = 1.0
    return mask


def oracle(x: Tensor, w: Tensor, layout: LinearFormat, parts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x_hat, w_hat) from the equations."""
    codes, s_x = x, torch.ones(())
    if layout.activations == "int8":
        gamma = x.abs().max(dim=-1, keepdim=True).values
        s_x = (gamma.clamp(min=1e-5) / 127).float().double()
        codes = round_clip(x / s_x, -128, 127)
    mask = torch.ones_like(x)
    if layout.sparsity and layout.pattern == "topk":
        mask = oracle_mask(codes.abs(), int((1 - layout.sparsity) * x.shape[-1]))
    elif layout.sparsity:
        blocks = codes.abs().reshape(-1, layout.block_size)
        mask = oracle_mask(blocks, round((1 - layout.sparsity) * layout.block_size)).reshape(x.shape)
    x_hat = codes * mask * s_x
    if layout.rescale == "l2":
        x_hat = x_hat / (x_hat.norm(dim=-1, keepdim=True) + 1e-6)
    w_hat = w.clone()
    if layout.weights == "ternary":
        groups = parts if layout.ternary_scale == "part" else [sorted(itertools.chain(*parts))]
        for rows in groups:
            alpha = w[rows].abs().mean().clamp(min=1e-5).float().double()
            w_hat[rows] = alpha * round_clip(w[rows] / alpha, -1, 1)
    return x_hat @ w_hat.T, x_hat, w_hat


FORMATS = [
    LinearFormat(sparsity=s, pattern=p, block_size=m, weights=w, activations=a, ternary_scale=t)
    for (s, p, m) in [(0.0, "topk", 32), (0.4, "topk", 32), (0.5, "block", 8), (0.5, "block", 4), (0.75, "block", 16)]
    for w in ("full", "ternary")
    for a in ("full", "int8")
    for t in (("part", "matrix") if w == "ternary" else ("part",))
]


@pytest.mark.parametrize(
    "layout", FORMATS, ids=lambda f: f"{f.pattern}{f.sparsity}-{f.weights}-{f.activations}-{f.ternary_scale}"
)
def test_forward_and_backward_are_those_of_the_equations(layout: LinearFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 48, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(24, 48, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(3, 5, 24, dtype=torch.float64, generator=generator)
    parts = WeightParts(groups=2, sizes=(8, 2, 2))  # rows of a fused q/k/v weight with two query groups
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19], [8, 9, 20, 21], [10, 11, 22, 23]]

    y = qsparse_linear(x, w, LinearCall(layout, parts, sparsity=layout.sparsity))
    y.backward(grad)

    expected, x_hat, w_hat = oracle(x.detach(), w.detach(), layout, rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # eq. 12-13: straight through mask and rounding; the weight's gradient sees the masked, quantized input.
    torch.testing.assert_close(x.grad, grad @ w_hat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(w.grad, grad.flatten(0, 1).T @ x_hat.flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_masked_entries_receive_gradient() -> None:
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    w = torch.ones(1, 4, requires_grad=True)
    layout = LinearFormat(sparsity=0.5)
    y = qsparse_linear(x, w, LinearCall(layout, WeightParts(1, (1,)), sparsity=0.5))
    y.backward()
    assert y.item() == 7.0
    assert x.grad is not None and x.grad.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert w.grad is not None and w.grad.tolist() == [[4.0, 3.0, 0.0, 0.0]]


def test_l2_rescale_divides_the_sparse_row_and_its_gradient() -> None:
    x = torch.tensor([[3.0, 4.0, 0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    layout = LinearFormat(sparsity=0.5, rescale="l2")
    y = qsparse_linear(x, w, LinearCall(layout, WeightParts(1, (1,)), sparsity=0.5))
    y.backward()
    assert y.item() == pytest.approx(11 / 5, rel=1e-6)
    torch.testing.assert_close(x.grad, w.detach() / 5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_product_is_exact_and_rounded_once(dtype: torch.dtype) -> None:
    """In every precision y is the exact integer sum, scaled in float32 and rounded to the type: computed in int64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 96, generator=generator).to(dtype)
    w = torch.randn(10, 96, generator=generator).to(dtype)
    layout = LinearFormat(sparsity=0.5, weights="ternary", activations="int8")
    y = qsparse_linear(x, w, LinearCall(layout, WeightParts(1, (10,)), sparsity=0.5))
    s_x = (x.abs().amax(-1, keepdim=True).double() / 127).float()
    codes = (x.float() / s_x).round().clamp(-128, 127)
    codes = (codes * oracle_mask(codes.abs(), 48)).long()
    s_w = w.double().abs().mean().float()
    ternary = (w.float() / s_w).round().clamp(-1, 1).long()
    expected = ((codes @ ternary.T).float() * (s_x * s_w)).to(dtype)
    assert torch.equal(y, expected)


def test_quantization_warmup_interpolates() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 16, dtype=torch.float64, generator=generator)
    w = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    layout = LinearFormat(weights="ternary", activations="int8")
    _, x_hat, w_hat = oracle(x, w, layout, [list(range(6))])
    for fraction in (0.0, 0.25, 1.0):
        y = qsparse_linear(x, w, LinearCall(layout, WeightParts(1, (6,)), quantization=fraction))
        expected = (x + fraction * (x_hat - x)) @ (w + fraction * (w_hat - w)).T
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
