"""SubLN with a gain per expert against `fused`, one expert after the other; weighted outputs against torch."""

import pytest
import torch
from torch import Tensor

from kernels import fused, fused_backward, grouped_fused, grouped_weight
from kernels.dispatch import Activation, Before
from kernels.triton_kernels import FusedKernels
from moe.front import GroupedFused

CASES: tuple[tuple[Activation | None, int, list[int], int | None, torch.dtype], ...] = (
    ("relu2_glu", 96, [3, 0, 8, 1], None, torch.float32),
    ("relu2", 64, [0, 0, 4], 32, torch.bfloat16),
    (None, 80, [5], None, torch.float32),
    ("swiglu", 48, [1, 2, 0, 6, 0], None, torch.bfloat16),
)


@pytest.mark.parametrize(("activation", "features", "counts", "block", "dtype"), CASES)
def test_experts_one_after_the_other(
    device: str, activation: Activation | None, features: int, counts: list[int], block: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    T, halves = sum(counts), 1 if activation in (None, "relu2") else 2
    x, grad = normal(T, halves * features).bfloat16(), normal(T, features).bfloat16()
    gains = (1 + 0.1 * normal(len(counts), features)).to(dtype)
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    given = {"activation": activation, "offsets": torch.tensor(bounds, dtype=torch.int32, device=device)}
    kept = (block or features) // 2
    found = grouped_fused.sparsify(x, kept, block, gain_EF=gains, eps=1e-5, **given)
    assert found.rstd is not None
    dx, dgain = grouped_fused.backward(grad, x, gain_EF=gains, rstd=found.rstd, **given)
    assert dgain.dtype == dtype
    front, before = GroupedFused(FusedKernels(), given["offsets"]), Before(activation, gains, 1e-5)
    through_layer = *front.sparsify(x, kept, block, before), *front.backward(grad, x, before, found.rstd)
    assert all(torch.equal(a, b) for a, b in zip(through_layer, (*found, dx, dgain), strict=True))
    for expert, count in enumerate(counts):
        rows = slice(bounds[expert], bounds[expert] + count)
        want = fused.sparsify(x[rows], kept, block, activation=activation, gain=gains[expert], eps=1e-5)
        assert want.rstd is not None
        for mine, theirs in zip(found, want, strict=True):
            assert torch.equal(mine[rows], theirs)
        want_dx, want_dgain = fused_backward.backward(
            grad[rows], x[rows], activation=activation, gain=gains[expert], rstd=want.rstd
        )
        assert torch.equal(dx[rows], want_dx)
        bound = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(dgain[expert], want_dgain, rtol=bound, atol=bound)


def test_weighted_outputs_are_those_of_torch(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for T, D in ((5, 96), (3, 4100), (0, 16)):
        y = torch.randn(T, D, generator=generator).bfloat16().to(device).requires_grad_()
        probs = torch.rand(T, generator=generator).to(device).requires_grad_()
        grad = torch.randn(T, D, generator=generator).bfloat16().to(device)
        want = (y * probs.unsqueeze(-1)).to(y.dtype)
        want_dy, want_dprobs = torch.autograd.grad(want, (y, probs), grad)
        assert torch.equal(grouped_weight.weigh(y.detach(), probs.detach()), want)
        dy, dprobs = grouped_weight.backward(grad, y.detach(), probs.detach())
        assert torch.equal(dy, want_dy)
        torch.testing.assert_close(dprobs, want_dprobs, rtol=1e-5, atol=1e-4)


def test_mistakes_are_named(device: str) -> None:
    x, gains = torch.zeros(4, 64, device=device).bfloat16(), torch.zeros(2, 64, device=device)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"offsets: shape \[3\], expected \[2\]"):
        grouped_fused.sparsify(x, None, offsets=offsets, activation=None, gain_EF=gains[:1], eps=1e-5)
    with pytest.raises(ValueError, match=r"gain_EF: shape \[2, 64\], expected \[any, 32\]"):
        grouped_fused.sparsify(x, None, offsets=offsets, activation="swiglu", gain_EF=gains, eps=1e-5)
    with pytest.raises(ValueError, match="grad: shape"):
        grouped_fused.backward(
            x[:3], x, offsets=offsets, activation=None, gain_EF=gains, rstd=torch.ones(4, 1, device=device)
        )
    with pytest.raises(ValueError, match=r"probs_T: dtype torch.bfloat16, expected torch.float32"):
        grouped_weight.weigh(x, torch.ones(4, device=device).bfloat16())
