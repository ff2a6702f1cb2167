"""RMSNorm of rows spread over ranks against autograd through the whole row in float64."""

import pytest
import torch
from torch import Tensor

from kernels import sharded_norm

EPS = 1e-5
ULP = 2**-7
"""bf16 results: half a unit on a GPU, a whole one in the interpreter, which cuts off."""


def whole_row(x: Tensor, gain: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, gain = x.double().requires_grad_(), gain.double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
    return y.detach(), *torch.autograd.grad(y, (x, gain), grad.double())


def by_shards(x: Tensor, gain: Tensor, grad: Tensor, ranks: int) -> list[Tensor]:
    """What the ranks do, one after the other; results of the whole row."""
    features = x.shape[-1]
    parts = list(zip(*(t.chunk(ranks, dim=-1) for t in (x, gain, grad)), strict=True))
    squares = torch.stack([sharded_norm.sum_squares(part) for part, _, _ in parts]).sum(0)
    normed = [sharded_norm.normalize(part, squares, weight, features, EPS) for part, weight, _ in parts]
    rstd = normed[0][1]
    dots = torch.stack([sharded_norm.gradient_dots(dy, part, weight, rstd) for part, weight, dy in parts]).sum(0)
    grads = [sharded_norm.gradients(dy, part, weight, rstd, dots, features) for part, weight, dy in parts]
    results = ([y for y, _ in normed], [dx for dx, _ in grads], [dgain for _, dgain in grads])
    return [torch.cat(shards, dim=-1) for shards in results]


@pytest.mark.parametrize(("tokens", "features", "ranks"), [(5, 126, 2), (3, 1000, 4), (40, 64, 1), (2, 21, 3)])
@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients(tokens: int, features: int, ranks: int, gain_dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(features)
    x, grad = (torch.randn(tokens, features, generator=generator).bfloat16().to(device) for _ in range(2))
    gain = (1 + 0.3 * torch.randn(features, generator=generator)).to(gain_dtype).to(device)
    for found, expected in zip(by_shards(x, gain, grad, ranks), whole_row(x, gain, grad), strict=True):
        assert ((found.double() - expected).abs() <= ULP * expected.abs() + 1e-3 * expected.abs().max()).all()


def test_what_the_kernels_refuse(device: str) -> None:
    x = torch.zeros(2, 8, device=device).bfloat16()
    with pytest.raises(ValueError, match=r"x is torch\.float32, the kernel takes"):
        sharded_norm.sum_squares(x.float())
    with pytest.raises(ValueError, match=r"gain has shape \(7,\)"):
        sharded_norm.normalize(x, sharded_norm.sum_squares(x), x[0, :7], 16, EPS)
