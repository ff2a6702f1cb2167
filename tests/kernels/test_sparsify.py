"""Sparsify + quantize in one pass against the reference, bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels import fused, reference, sparsify

SIZES = [(2, 63), (2, 100), (1, 1000), (3, 256), (1, 1), (2, 7)]


def rows(kind: str, tokens: int, features: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + features)
    x = torch.randn(tokens, features, generator=generator)
    if kind == "heavy":
        x = x * torch.exp(2 * torch.randn(tokens, features, generator=generator))
    elif kind == "zero":
        x = x * 0
    elif kind == "constant":
        x = torch.full_like(x, -0.37)
    elif kind == "subnormal":
        x = x * 1e-39
    elif kind == "integers":  # exact halves after scaling by a power of two: rounding and ties at their worst
        x = torch.randint(-4, 5, x.shape, generator=generator).float()
    elif kind == "negative zero":
        x = torch.where(x > 0.5, x, -0.0)
    return x.to(dtype).to(device)


def expected(x: Tensor, kept: int | None, block: int | None) -> tuple[Tensor, Tensor]:
    scale = reference.row_scale(x.abs().amax(-1, keepdim=True))
    codes = reference.absmax_codes(x, scale)
    if kept is not None:
        mask = reference.topk_mask(codes, kept) if block is None else reference.block_mask(codes, kept, block)
        codes = reference.apply_mask(codes, mask)
    return codes, scale


def assert_same(x: Tensor, kept: int | None, block: int | None = None) -> None:
    codes, scale = sparsify.sparsify(x, kept, block)
    want_codes, want_scale = expected(x, kept, block)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes, want_codes)


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero", "constant", "subnormal", "integers", "negative zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_topk_of_a_row(kind: str, dtype: torch.dtype, device: str) -> None:
    for tokens, features in SIZES:
        x = rows(kind, tokens, features, device, dtype)
        for kept in {None, 1, features // 2 or 1, features}:
            assert_same(x, kept)


@pytest.mark.parametrize("kind", ["normal", "heavy", "constant", "integers"])
@pytest.mark.parametrize(("kept", "block"), [(2, 4), (16, 32), (3, 5), (1, 2), (30, 64), (7, 10)])
def test_n_of_every_m(kind: str, kept: int, block: int, device: str) -> None:
    for num_blocks in (1, 3, 8, 33):
        assert_same(rows(kind, 3, num_blocks * block, device), kept, block)


def test_launches_fit_on_a_multiprocessor() -> None:
    tables = (sparsify.LAUNCHES, fused.LAUNCHES, fused.NORM_LAUNCHES, fused.SWIGLU_LAUNCHES)
    for words, (warps, registers) in (item for table in tables for item in table.items()):
        assert words >= 32 * warps and warps * 32 * (registers or 0) <= 65536
    assert sparsify.launch_options(sparsify.LAUNCHES, 8)["num_warps"] == 1
    assert sparsify.launch_options(fused.LAUNCHES, 8192)["num_warps"] == fused.LAUNCHES[4096][0]  # blocks of 5, padded


def test_full_sizes(device: str) -> None:
    tokens = 64 if device == "cuda" else 2
    for features in (2048, 4096, 14336) if device == "cuda" else (2048,):
        x = rows("heavy", tokens, features, device)
        assert_same(x, features // 2)
        assert_same(x, 16, 32)


def test_rows_may_be_strided_batched_and_absent(device: str) -> None:
    wide = rows("normal", 6, 200, device)
    assert_same(wide[:, 40:140], 30)
    assert_same(wide[::2], 30)
    assert_same(rows("normal", 6, 200, device).view(2, 3, 200), 30)
    codes, scale = sparsify.sparsify(wide[:0], 30)
    assert codes.shape == (0, 200) and scale.shape == (0, 1)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(bad: float, device: str) -> None:
    x = rows("normal", 3, 100, device)
    x[1, 17] = bad
    _, scale = sparsify.sparsify(x, 50)
    assert scale.isfinite().flatten().tolist() == [True, False, True]


def test_every_pair_of_bf16_values_gets_the_code_of_the_ieee_division(device: str) -> None:
    """One row per significand of gamma, holding every bf16 magnitude that rounds to a code above 0."""
    significands = torch.arange(128, 256, dtype=torch.float32)
    below = (significands[:, None] * 2.0 ** -torch.arange(11)).flatten()
    for exponent in (0, -80, 100):
        x = torch.where(below <= significands[:, None], below, 0.0) * 2.0**exponent
        x[:, 0] = significands * 2.0**exponent
        assert_same(x.bfloat16().to(device), None)
    tiny = torch.arange(0x3728, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # up to 1e-5, subnormals too
    assert_same(tiny[None].to(device), None)


def test_bad_input_is_refused_before_the_launch(device: str) -> None:
    x = rows("normal", 4, 96, device)
    with pytest.raises(ValueError, match="kept=97 must be 1 to 96"):
        sparsify.sparsify(x, 97)
    with pytest.raises(ValueError, match="kept=0 must be 1 to 32"):
        sparsify.sparsify(x, 0, 32)
    with pytest.raises(ValueError, match="block=36 must be 2 to 64 and divide the 96 features"):
        sparsify.sparsify(x, 4, 36)
    with pytest.raises(ValueError, match=r"x is torch.int8, the kernel takes torch.bfloat16"):
        sparsify.sparsify(x.to(torch.int8), 4)
    with pytest.raises(ValueError, match="x has stride 96 between features"):
        sparsify.sparsify(x.t(), 2)
    with pytest.raises(ValueError, match="x has 70000 features per row, the kernel takes 1 to 65536"):
        sparsify.sparsify(torch.zeros(1, 70000, dtype=torch.bfloat16, device=device), 2)
