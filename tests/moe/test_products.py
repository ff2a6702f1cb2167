"""Triton's grouped products against the loop over experts, one expert without tokens among them."""

from dataclasses import replace

import pytest
import torch

from kernels.dispatch import ReferenceKernels, kernels_for
from kernels.gradient_table import GradientTable
from moe.products import LoopedProducts, StackedWeights, TritonProducts
from qsparse_layers.linear_call import Codes

NUM_OUTPUTS, NUM_INPUTS, OFFSETS = 256, 64, (0, 5, 5, 14)


def operands(num_parts: int, device: str) -> tuple[Codes, StackedWeights, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_parts)
    T = OFFSETS[-1]
    x = Codes(
        torch.randint(-128, 128, (T, NUM_INPUTS), generator=generator, dtype=torch.int8).to(device),
        (torch.rand(T, 1, generator=generator) + 0.1).to(device),
    )
    weights: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for _ in range(len(OFFSETS) - 1):
        codes = torch.randint(-1, 2, (NUM_OUTPUTS, NUM_INPUTS), generator=generator, dtype=torch.int8)
        scale = torch.rand(num_parts, generator=generator) + 0.2
        rows = scale if num_parts == 1 else scale.repeat_interleave(NUM_OUTPUTS // num_parts).unsqueeze(1)
        weights.append((codes.to(device), rows.to(device)))
    grad = torch.randn(T, NUM_OUTPUTS, generator=generator).bfloat16().to(device)
    return x, StackedWeights.of(weights), torch.tensor(OFFSETS, dtype=torch.int32, device=device), grad


@pytest.mark.parametrize("num_parts", [1, 2])
def test_triton_computes_what_the_loop_does(num_parts: int, device: str) -> None:
    x, weights, offsets, grad = operands(num_parts, device)
    looped, triton = LoopedProducts(ReferenceKernels()), TritonProducts(ReferenceKernels())
    assert torch.equal(
        triton.forward(x, weights, offsets, dtype=torch.bfloat16),
        looped.forward(x, weights, offsets, dtype=torch.bfloat16),
    )
    expected: tuple[torch.Tensor, ...] = looped.backward(grad, x, weights, offsets, e4m3=False, main_grads=None)
    # Exact: bf16 rounds the dequantized input and the result, 2^-9 each.  e4m3: 3 mantissa bits of dY and of x.
    for e4m3, tolerance in ((False, 4e-3), (True, 0.1)):
        dx, dw = triton.backward(grad, x, weights, offsets, e4m3=e4m3, main_grads=None)
        assert dw is not None
        assert not dw[1].any()
        buffers = torch.ones_like(dw)
        added = triton.backward(grad, x, weights, offsets, e4m3=e4m3, main_grads=GradientTable.of(list(buffers)))
        assert added[1] is None
        for mine, theirs in zip((dx, dw, added[0], buffers - 1), (*expected, *expected), strict=True):
            assert float((mine.double() - theirs.double()).norm() / theirs.double().norm()) < tolerance


def test_experts_kept_in_bf16_change_no_bit(device: str) -> None:
    x, weights, offsets, grad = operands(2, device)
    keeping, plain = TritonProducts(kernels_for("cuda", keep_bf16_weights=True)), TritonProducts(kernels_for("cuda"))
    expanded = keeping.expand(weights)
    assert expanded is not None and torch.equal(expanded, weights.codes.bfloat16())
    assert plain.expand(weights) is None and LoopedProducts(ReferenceKernels()).expand(weights) is None
    narrow = StackedWeights(weights.codes[:, :64].contiguous(), weights.scale[:, :64])
    assert keeping.expand(narrow) is None  # its products are looped
    kept = replace(weights, expanded=expanded)
    found = keeping.backward(grad, x, kept, offsets, e4m3=False, main_grads=None)
    expected = plain.backward(grad, x, weights, offsets, e4m3=False, main_grads=None)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine, theirs)
    # It is the copy that dX is made of.
    other = keeping.backward(grad, x, replace(kept, expanded=2 * expanded), offsets, e4m3=False, main_grads=None)
    assert torch.equal(other[0], 2 * expected[0])
