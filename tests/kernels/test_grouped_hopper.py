"""The Hopper kernels of the grouped products against the portable Triton ones, on a Hopper GPU.

Integer forms agree bit for bit.  Float forms add in another order: bfloat16 results differ by a rounding, FP8 sums
(which keep 13 bits below the largest term) by what they lose at each of their steps.
"""

# ruff: noqa: E741 - O is a dimension

import pytest
import torch
from torch import Tensor

from kernels.gemm import has_hopper_kernel
from kernels.gradient_table import GradientTable
from kernels.grouped_gemm import (
    DGRAD_CONFIG,
    DGRAD_FP8_CONFIG,
    FORWARD_CONFIG,
    grouped_dgrad,
    grouped_dgrad_fp8,
    grouped_forward,
)
from kernels.grouped_wgrad import WGRAD_FP8_CONFIG, grouped_wgrad_fp8, pad_offsets, padded_columns

FP8 = torch.float8_e4m3fn
# (token counts of the experts, output features, input features)
CASES = [
    ([1], 16, 16),
    ([0, 1, 31, 32, 0, 33, 3, 0], 112, 80),
    ([0, 0, 0, 8192, 0, 0, 0, 0], 1024, 2048),
    ([128, 256, 127, 129, 0, 384] * 11, 1408, 640),
]


@pytest.fixture(autouse=True)
def hopper(device: str) -> None:
    """Skip elsewhere."""
    if device != "cuda" or not has_hopper_kernel(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU and a Triton with Gluon")


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], device="cuda").cumsum(0).to(torch.int32)


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0)).cuda()


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).cuda() + 0.01


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16().cuda()


def difference(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got.float()).all()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("parts", [1, 2])
def test_forward(parts: int) -> None:
    for counts, O, D in CASES:
        T, E = sum(counts), len(counts)
        operands = integers(-128, 128, T, D), integers(-1, 2, E, O, D), offsets_of(counts)
        given = {"x_scale_T": scales(T), "weight_scale_EP": scales(E, parts)}
        want = grouped_forward(*operands, **given, config=FORWARD_CONFIG)
        assert torch.equal(grouped_forward(*operands, **given), want), (counts, O, D)


def test_forward_of_rows_that_the_copy_engine_cannot_write() -> None:
    operands = integers(-128, 128, 50, 64), integers(-1, 2, 2, 20, 64), offsets_of([17, 33])
    given = {"x_scale_T": scales(50), "weight_scale_EP": scales(2, 1)}
    want = grouped_forward(*operands, **given, config=FORWARD_CONFIG)
    assert torch.equal(grouped_forward(*operands, **given), want)


@pytest.mark.parametrize("parts", [1, 2])
def test_dgrad(parts: int) -> None:
    for counts, O, D in CASES:
        if parts == 2 and O % 128:
            continue
        operands = floats(sum(counts), O), integers(-1, 2, len(counts), O, D).bfloat16(), offsets_of(counts)
        scale = scales(len(counts), parts)
        want = grouped_dgrad(*operands, weight_scale_EP=scale, config=DGRAD_CONFIG)
        assert difference(grouped_dgrad(*operands, weight_scale_EP=scale), want) < 2**-8, (counts, O, D)


def test_fp8_dgrad() -> None:
    for counts, O, D in CASES:
        operands = floats(sum(counts), O).to(FP8), integers(-1, 2, D, len(counts), O).float().to(FP8)
        given = {"offsets": offsets_of(counts), "grad_scale_T": scales(sum(counts))}
        want = grouped_dgrad_fp8(*operands, **given, config=DGRAD_FP8_CONFIG)
        bound = 2**-8 + O / 32 * 2**-14
        assert difference(grouped_dgrad_fp8(*operands, **given), want) < bound, (counts, O, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
def test_fp8_wgrad(parts: int, dtype: torch.dtype) -> None:
    for counts, O, D in CASES:
        operands, scale = wgrad_operands(counts, O, D), scales(len(counts), parts)
        got = grouped_wgrad_fp8(*operands, scale_EP=scale, dtype=dtype)
        want = grouped_wgrad_fp8(*operands, scale_EP=scale, dtype=dtype, config=WGRAD_FP8_CONFIG)
        assert got is not None and want is not None
        bound = (2**-8 if dtype == torch.bfloat16 else 2**-10) + max(counts) / 32 * 2**-14
        assert difference(got, want) < bound, (counts, O, D)
        assert not any(got[expert].any() for expert, count in enumerate(counts) if count == 0)


def test_fp8_wgrad_adds_to_main_gradients_in_reverse_order() -> None:
    for counts, O, D in CASES:
        operands, scale = wgrad_operands(counts, O, D), scales(len(counts), 2)
        before = floats(len(counts), O + 1, D).float()
        found = []
        for options in ({}, {"config": WGRAD_FP8_CONFIG}):
            buffer = before.clone()
            main_grads = GradientTable.of(list(buffer[:, :O].unbind())[::-1])
            assert grouped_wgrad_fp8(*operands, scale_EP=scale, main_grads=main_grads, **options) is None  # type: ignore[arg-type]
            found.append(buffer)
        assert difference(*found) < 2**-10 + max(counts) / 32 * 2**-14, (counts, O, D)
        assert torch.equal(found[0][:, O], before[:, O])
        for expert, count in enumerate(reversed(counts)):
            assert count or torch.equal(found[0][expert], before[expert])


def wgrad_operands(counts: list[int], O: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = padded_columns(sum(counts), len(counts))
    operands = floats(O, columns).to(FP8), floats(D, columns).to(FP8), pad_offsets(offsets_of(counts))
    operands[0][:, int(operands[2][-1]) :] = torch.nan  # columns of no expert
    return operands
