"""Projections that are computed again instead of kept: the same numbers to the last bit, and nothing held."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import LinearCall, WeightParts
from qsparse_layers.recompute import recomputed
from tests.distributed.test_layouts import DENSE, FULL, TP_SP, case
from tests.testing import torchrun


class Watched(torch.autograd.Function):
    """Gate times up, which tells on its node where what it saved lies."""

    @staticmethod
    def forward(ctx, product: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(product)
        gate, up = product.chunk(2, dim=-1)
        return gate * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat([grad * up, grad * gate], dim=-1)


def product() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 32, generator=generator).requires_grad_()
    w = torch.randn(48, 32, generator=generator).requires_grad_()
    layout = LinearFormat(sparsity=0.5, weights="ternary", activations="int8")
    return x, w, qsparse_linear(x, w, LinearCall(layout, WeightParts(1, (24, 24)), sparsity=0.5))


def test_gradients_are_those_of_the_kept_product() -> None:
    x, w, kept = product()
    Watched.apply(kept).square().sum().backward()
    x_again, w_again, y = product()
    with recomputed(y):
        z = Watched.apply(y)
    assert torch.equal(z.grad_fn.saved_tensors[0], y)
    assert z.grad_fn.saved_tensors[0].data_ptr() != y.data_ptr()
    z.square().sum().backward()
    assert torch.equal(x_again.grad, x.grad)
    assert torch.equal(w_again.grad, w.grad)


def test_what_is_no_such_product_is_kept() -> None:
    y = torch.ones(2, 4, requires_grad=True) * 2
    with recomputed(y):
        z = Watched.apply(y)
    assert z.grad_fn.saved_tensors[0].data_ptr() == y.data_ptr()


@pytest.mark.slow
def test_a_run_has_the_same_losses_and_gradients(tmp_path: Path) -> None:
    cases = {}
    for name, layout in {"full": FULL, "dense": DENSE, "e4m3": {**FULL, "gradients": "e4m3"}}.items():
        for recompute in ("none", "up_projection"):
            cases[f"{name}:{recompute}"] = case(layout, "fp32", TP_SP, steps=6, recompute=recompute)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun("tests.distributed.trajectories", str(tmp_path / "cases.json"), str(tmp_path / "out.json"), nproc=2)
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("full", "dense", "e4m3"):
        assert found[f"{name}:none"] == found[f"{name}:up_projection"], name
