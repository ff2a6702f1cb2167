"""`gradients: e4m3` rounds dY once, for both backward products: against float64 products of the rounded gradient."""

import pytest
import torch
from torch import Tensor

from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import LinearCall, WeightParts

EXACT = LinearFormat(sparsity=0.5, weights="ternary", activations="int8")
ROUNDED = EXACT.model_copy(update={"gradients": "e4m3"})


def backward(layout: LinearFormat, parts: WeightParts) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 16, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(48, 64, generator=generator, dtype=torch.float64)
    weight[24:] *= 5.0
    weight.requires_grad_()
    grad = torch.randn(4, 16, 48, generator=generator, dtype=torch.float64) * torch.logspace(-4, 0, 16)[:, None]
    y = qsparse_linear(x, weight, LinearCall(layout, parts, sparsity=0.5))
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("parts", [WeightParts(1, (48,)), WeightParts(1, (24, 24)), WeightParts(2, (12, 6, 6))])
def test_gradients_are_near_the_exact_ones_and_unbiased(parts: WeightParts) -> None:
    exact, rounded = backward(EXACT, parts), backward(ROUNDED, parts)
    assert torch.equal(exact[0], rounded[0])  # the forward pass is the same
    for found, expected in zip(rounded[1:], exact[1:], strict=True):
        assert not torch.equal(found, expected)
        assert (found - expected).norm() / expected.norm() < 0.06
        assert float((found * expected).sum() / expected.square().sum()) == pytest.approx(1.0, abs=0.01)
    small = (rounded[1][:, 0] - exact[1][:, 0]).norm() / exact[1][:, 0].norm()
    assert small < 0.06  # a scale per token: gradients ten thousand times smaller keep their precision in dX


def test_gradients_that_eight_bits_hold_are_not_changed() -> None:
    """Powers of two and codes +-127: everything e4m3 rounds is one of its values."""
    x = torch.tensor([[127.0, -127.0, 127.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    layout = LinearFormat(weights="ternary", activations="int8", gradients="e4m3")
    grad = torch.tensor([[4.0, -0.5]], dtype=torch.float64)
    qsparse_linear(x, weight, LinearCall(layout, WeightParts(1, (2,)))).backward(grad)
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, grad.t() @ x.detach(), rtol=1e-7, atol=0)


def test_it_needs_codes_on_both_sides() -> None:
    with pytest.raises(ValueError, match="gradients=e4m3 needs weights=ternary and activations=int8"):
        LinearFormat(weights="ternary", gradients="e4m3")
