"""Triton's grouped products against the loop over experts, one expert without tokens among them."""

import os

import pytest
import torch

from kernels.dispatch import ReferenceKernels
from moe.products import LoopedProducts, StackedWeights, TritonProducts
from qsparse_layers.functional import Codes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are loaded, which `TritonProducts` does when it runs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_OUTPUTS, NUM_INPUTS, OFFSETS = 256, 64, (0, 5, 5, 14)


def operands(num_parts: int) -> tuple[Codes, StackedWeights, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_parts)
    T = OFFSETS[-1]
    x = Codes(
        torch.randint(-128, 128, (T, NUM_INPUTS), generator=generator, dtype=torch.int8).to(DEVICE),
        (torch.rand(T, 1, generator=generator) + 0.1).to(DEVICE),
    )
    weights: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for _ in range(len(OFFSETS) - 1):
        codes = torch.randint(-1, 2, (NUM_OUTPUTS, NUM_INPUTS), generator=generator, dtype=torch.int8)
        scale = torch.rand(num_parts, generator=generator) + 0.2
        rows = scale if num_parts == 1 else scale.repeat_interleave(NUM_OUTPUTS // num_parts).unsqueeze(1)
        weights.append((codes.to(DEVICE), rows.to(DEVICE)))
    grad = torch.randn(T, NUM_OUTPUTS, generator=generator).bfloat16().to(DEVICE)
    return x, StackedWeights.of(weights), torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE), grad


@pytest.mark.parametrize("num_parts", [1, 2])
def test_triton_computes_what_the_loop_does(num_parts: int) -> None:
    x, weights, offsets, grad = operands(num_parts)
    looped, triton = LoopedProducts(ReferenceKernels()), TritonProducts(ReferenceKernels())
    assert torch.equal(
        triton.forward(x, weights, offsets, dtype=torch.bfloat16),
        looped.forward(x, weights, offsets, dtype=torch.bfloat16),
    )
    expected = looped.backward(grad, x, weights, offsets, e4m3=False)
    # Exact: bf16 rounds the dequantized input and the result, 2^-9 each.  e4m3: 3 mantissa bits of dY and of x.
    for e4m3, tolerance in ((False, 4e-3), (True, 0.1)):
        found = triton.backward(grad, x, weights, offsets, e4m3=e4m3)
        for mine, theirs in zip(found, expected, strict=True):
            assert float((mine.double() - theirs.double()).norm() / theirs.double().norm()) < tolerance
        assert not found[1][1].any()
