"""The products of a linear layer's three passes against integer and float64 references."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.gemm import TILINGS_8_BIT, TILINGS_16_BIT, Tiling, _gemm_kernel, gemm
from kernels.tuning import Tuner

SHAPES = [(63, 48, 112), (1, 16, 16), (100, 1008, 160), (130, 272, 64)]
TILINGS = [Tiling(16, n, 32, warps=1, stages=1, flatten=False, group=2) for n in (16, 32)]
LARGE = [(1000, 2048, 4096), (8192, 4096, 4096), (777, 1024, 14336)]


def shapes(device: str) -> list[tuple[int, int, int]]:
    return SHAPES + (LARGE if device == "cuda" else [])


def codes(rows: int, columns: int, limit: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + rows + columns)
    return torch.randint(-limit, limit + 1, (rows, columns), generator=generator, dtype=torch.int8).to(device)


def floats(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_int8_forward_is_bit_equal_to_the_reference(device: str, to_bf16: Callable[[Tensor], Tensor]) -> None:
    for tokens, outputs, features in shapes(device):
        x = codes(tokens, features, 127, device)
        weight = codes(outputs, features, 1, device)
        x_scale, weight_scale = floats(tokens, 1, device=device).abs(), floats(outputs, device=device).abs()
        want = reference.linear(x, weight, x_scale_T1=x_scale, weight_scale_O=weight_scale, dtype=torch.float32)
        assert torch.equal(gemm(x, weight, a_scale=x_scale, b_scale=weight_scale), to_bf16(want))
        one = weight_scale[:1]
        want = reference.linear(x, weight, x_scale_T1=x_scale, weight_scale_O=one, dtype=torch.float32)
        assert torch.equal(gemm(x, weight, a_scale=x_scale, b_scale=one, dtype=torch.float32), want)


def test_extreme_codes_do_not_overflow(device: str) -> None:
    features = 16384 if device == "cuda" else 512
    x = torch.full((4, features), -127, dtype=torch.int8, device=device)
    weight = torch.ones(16, features, dtype=torch.int8, device=device)
    assert torch.equal(gemm(x, weight, dtype=torch.float32), torch.full((4, 16), -127.0 * features, device=device))


@pytest.mark.parametrize(("a_k_major", "b_k_major"), [(True, True), (True, False), (False, True), (False, False)])
def test_bf16_in_every_storage_order(a_k_major: bool, b_k_major: bool, device: str) -> None:
    for m, n, k in [(64, 48, 112), (128, 272, 64), *(LARGE[:2] if device == "cuda" else [])]:
        m -= m % 8
        a, b = floats(m, k, device=device).bfloat16(), floats(n, k, device=device, seed=1).bfloat16()
        want = a.double() @ b.double().t()
        got = gemm(
            a if a_k_major else a.t().contiguous(), b if b_k_major else b.t().contiguous(),
            a_k_major=a_k_major, b_k_major=b_k_major, dtype=torch.float32,
        )  # fmt: skip
        assert error(got, want) < 1e-5  # tensor cores cut off what they add


def test_accumulates_into_float32(device: str) -> None:
    grad, x = floats(96, 64, device=device).bfloat16(), floats(96, 48, device=device, seed=1).bfloat16()
    main_grad = floats(64, 48, device=device, seed=2)
    scale = torch.tensor([0.37], device=device)
    want = main_grad.double() + scale.double() * (grad.double().t() @ x.double())
    got = gemm(grad, x, a_k_major=False, b_k_major=False, b_scale=scale, out=main_grad)
    assert got is main_grad
    assert error(main_grad, want) < 1e-6


@pytest.mark.gpu
def test_fp8_products(device: str) -> None:
    for m, n, k in LARGE:
        a, b = floats(m, k, device=device).to(torch.float8_e4m3fn), codes(n, k, 1, device).to(torch.float8_e4m3fn)
        scale = floats(m, device=device).abs()
        want = scale.double()[:, None] * (a.double() @ b.double().t())
        assert error(gemm(a, b, a_scale=scale, dtype=torch.float32), want) < 1e-3


def test_every_element_is_written_and_nothing_beside_it(device: str) -> None:
    x, weight = codes(65, 64, 127, device), codes(48, 64, 1, device)
    frame = torch.full((65, 64), torch.nan, dtype=torch.float32, device=device)
    view = frame[:, 8:56]
    view.zero_()
    gemm(x, weight, out=view)
    assert torch.equal(view, (x.float() @ weight.float().t()))
    assert frame[:, :8].isnan().all() and frame[:, 56:].isnan().all()


def test_empty_products(device: str) -> None:
    assert gemm(codes(0, 32, 1, device), codes(16, 32, 1, device)).shape == (0, 16)
    zero_terms = gemm(codes(3, 0, 1, device), codes(16, 0, 1, device))
    assert torch.equal(zero_terms, torch.zeros_like(zero_terms))


def test_bad_input_is_refused_before_the_launch(device: str) -> None:
    x, weight = codes(4, 64, 127, device), codes(16, 64, 1, device)
    with pytest.raises(ValueError, match="sum over 64 and 32 terms"):
        gemm(x, weight[:, :32])
    with pytest.raises(ValueError, match=r"b is torch.float32, the kernel takes torch.int8"):
        gemm(x, weight.float())
    with pytest.raises(ValueError, match=r"a of shape \(4, 63\) has rows of 63 bytes"):
        gemm(codes(4, 63, 1, device), codes(16, 63, 1, device))
    with pytest.raises(ValueError, match="need both operands K-major"):
        gemm(x.t().contiguous(), weight, a_k_major=False)
    with pytest.raises(ValueError, match="a_scale has 3 numbers, the product takes 4"):
        gemm(x, weight, a_scale=torch.ones(3, device=device))
    with pytest.raises(ValueError, match="may leave float32"):
        gemm(torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(16, 2**17, dtype=torch.int8))


def test_tilings_that_are_tried_add_nothing(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several is launched as often as the timer likes, for every new size."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = Tuner(_gemm_kernel, TILINGS, timer=lambda call: float(max(call() or 1.0 for _ in range(3))))
    for terms in (64, 64, 32):
        out = torch.full((16, 32), 0.5, device=device)
        ones = torch.ones(32, terms, dtype=torch.bfloat16, device=device)
        gemm(ones[:16], ones, out=out, tiles=tiles)
        assert (out == terms + 0.5).all()


def shared_bytes(tiling: Tiling, result: torch.dtype) -> int:
    """Of the operands of all stages, 128 bytes wide each, and of the result as it is stored."""
    columns = tiling.n // 2 if tiling.halves else tiling.n
    return 128 * tiling.stages * (tiling.m + tiling.n) + tiling.m * columns * result.itemsize


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tiling", [*TILINGS_8_BIT, *TILINGS_16_BIT], ids=str)
def test_portable_tilings(tiling: Tiling, dtype: torch.dtype, device: str) -> None:
    tiles = Tuner(_gemm_kernel, [tiling])
    available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if dtype == torch.float32 and shared_bytes(tiling, dtype) > available:
        pytest.skip(f"takes {shared_bytes(tiling, dtype)} bytes of shared memory, this GPU has {available}")
    for m, n, k in LARGE[:2]:
        x, weight = codes(m, k, 127, device), codes(n, k, 1, device)
        scale = floats(m, 1, device=device).abs()
        want = reference.linear(x, weight, x_scale_T1=scale, weight_scale_O=scale.flatten()[:1], dtype=dtype)
        if tiling in TILINGS_8_BIT:
            got = gemm(x, weight, a_scale=scale, b_scale=scale.flatten()[:1], dtype=dtype, tiles=tiles)
            assert torch.equal(got, want)
        else:
            a, b = floats(m, k, device=device).bfloat16(), weight.bfloat16()
            bound = 1e-5 if dtype == torch.float32 else 2**-8
            assert error(gemm(a, b, dtype=dtype, tiles=tiles), a.double() @ b.double().t()) < bound
