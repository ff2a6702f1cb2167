"""Grouped products against loops over experts: integer forms bit for bit, float forms against float64.

Relative errors (Frobenius): a bfloat16 result rounds each element by at most 2^-8 of it; float32 results of float32
sums stay below 1e-6 at these sizes on a CPU, while tensor cores cut off each partial sum: 512 of them lose 512 * 2^-23.
"""

# ruff: noqa: E741 - O is a dimension

import pytest
import torch
from torch import Tensor

from kernels import grouped_reference
from kernels.gradient_table import GradientTable
from kernels.grouped_gemm import grouped_dgrad, grouped_dgrad_fp8, grouped_forward
from kernels.grouped_wgrad import grouped_wgrad, grouped_wgrad_fp8, pad_offsets
from kernels.tile_launch import TileConfig

SMALL = TileConfig(32, 64, 32, num_warps=4, num_stages=2, group_m=2)
BF16_ROUNDING = 2**-8
FLOAT32_SUMS = 1e-4 if torch.cuda.is_available() else 1e-6
FP8 = torch.float8_e4m3fn

# (token counts of the experts, output features, input features)
CASES = [
    ([63], 48, 112),
    ([100, 0], 96, 240),
    ([0, 1, 31, 32, 0, 33, 3, 0], 112, 80),
    ([0, 0, 100, 0], 208, 48),
]
LARGE_CASES = [
    ([1000, 3, 0, 2045, 129, 777, 64, 78], 4096, 2048),
    ([0, 0, 0, 8192, 0, 0, 0, 0], 1024, 2048),
]


def cases(device: str) -> list[tuple[list[int], int, int, dict[str, TileConfig]]]:
    """Small cases with small tiles everywhere; large ones with the default tiles on a GPU."""
    small = [(*case, {"config": SMALL}) for case in CASES]
    return small + ([(*case, {}) for case in LARGE_CASES] if device == "cuda" else [])


def offsets_of(counts: list[int], device: str) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)


def randoms(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(low: int, high: int, shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=randoms(seed)).to(device)


def floats(shape: tuple[int, ...], device: str, kind: str = "normal", seed: int = 0) -> Tensor:
    """bfloat16 of the named distribution; heavy tails reach a thousand times the median."""
    values = torch.randn(shape, generator=randoms(seed))
    if kind == "heavy":
        values = values.sign() * values.abs().pow(6)
    return (values * (kind != "zero")).to(torch.bfloat16).to(device)


def scales(shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=randoms(seed)) + 0.01).to(device)


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got.float()).all()
    norm = want.double().norm()
    return float((got.double() - want.double()).norm() / (norm if norm > 0 else 1.0))


@pytest.mark.parametrize("parts", [1, 2])
def test_forward_is_the_reference_bit_for_bit(device: str, parts: int) -> None:
    for counts, O, D, options in cases(device):
        T, E = sum(counts), len(counts)
        codes, weight = integers(-128, 128, (T, D), device), integers(-1, 2, (E, O, D), device, seed=1)
        given = {"x_scale_T": scales((T,), device), "weight_scale_EP": scales((E, parts), device, seed=2)}
        offsets = offsets_of(counts, device)
        got = grouped_forward(codes, weight, offsets, **given, **options)
        assert torch.equal(got, grouped_reference.grouped_forward(codes, weight, offsets, **given))


@pytest.mark.parametrize("codes_value", [-128, 0])
def test_forward_of_extreme_and_of_zero_codes(device: str, codes_value: int) -> None:
    codes = torch.full((40, 64), codes_value, dtype=torch.int8, device=device)
    weight = torch.full((2, 48, 64), -1, dtype=torch.int8, device=device)
    one = torch.ones(40, device=device)
    got = grouped_forward(
        codes, weight, offsets_of([17, 23], device), x_scale_T=one, weight_scale_EP=one[:2, None].clone(), config=SMALL
    )
    assert torch.equal(got.float(), torch.full((40, 48), -64.0 * codes_value, device=device))


def test_forward_with_one_program_per_tile_and_without_tokens(device: str) -> None:
    codes, weight = integers(-128, 128, (100, 64), device), integers(-1, 2, (3, 48, 64), device)
    given = {"x_scale_T": scales((100,), device), "weight_scale_EP": scales((3, 1), device)}
    offsets = offsets_of([10, 57, 33], device)
    static = TileConfig(16, 32, 32, persistent=False, group_m=3)
    want = grouped_reference.grouped_forward(codes, weight, offsets, **given)
    assert torch.equal(grouped_forward(codes, weight, offsets, **given, config=static), want)
    given["x_scale_T"] = given["x_scale_T"][:0]
    assert grouped_forward(codes[:0], weight, offsets * 0, **given).shape == (0, 48)


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero"])
@pytest.mark.parametrize("parts", [1, 2])
def test_dgrad_against_float64(device: str, kind: str, parts: int) -> None:
    for counts, O, D, options in cases(device):
        T, E = sum(counts), len(counts)
        O = O // 64 * 64 if parts == 2 else O
        if O == 0:
            continue
        grad, weight = floats((T, O), device, kind), integers(-1, 2, (E, O, D), device)
        scale, offsets = scales((E, parts), device), offsets_of(counts, device)
        got = grouped_dgrad(grad, weight.bfloat16(), offsets, weight_scale_EP=scale, **options)
        want = grouped_reference.grouped_dgrad(grad, weight, offsets, weight_scale_EP=scale)
        assert error(got, want) < BF16_ROUNDING


def test_fp8_dgrad_against_float64_of_the_same_codes(device: str) -> None:
    for counts, O, D, options in cases(device):
        T, E = sum(counts), len(counts)
        grad, weight = floats((T, O), device).to(FP8), integers(-1, 2, (E, O, D), device)
        scale, offsets = scales((T,), device, seed=1), offsets_of(counts, device)
        weight_DEO = weight.permute(2, 0, 1).contiguous().float().to(FP8)
        got = grouped_dgrad_fp8(grad, weight_DEO, offsets, grad_scale_T=scale, **options)
        one = torch.ones(E, 1, device=device)
        want = grouped_reference.grouped_dgrad(grad.float(), weight, offsets, weight_scale_EP=one, grad_scale_T=scale)
        assert error(got, want) < BF16_ROUNDING


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero"])
def test_wgrad_against_float64(device: str, kind: str) -> None:
    for counts, O, D, options in cases(device):
        grad, x = floats((sum(counts), O), device, kind), floats((sum(counts), D), device, kind, seed=1)
        offsets = offsets_of(counts, device)
        want = grouped_reference.grouped_wgrad(grad, x, offsets)
        assert error(grouped_wgrad(grad, x, offsets, **options), want) < FLOAT32_SUMS
        assert error(grouped_wgrad(grad, x, offsets, dtype=torch.bfloat16, **options), want) < BF16_ROUNDING


def test_wgrad_adds_to_main_gradients_wherever_they_lie(device: str) -> None:
    for counts, O, D, options in cases(device):
        grad, x = floats((sum(counts), O), device), floats((sum(counts), D), device, seed=1)
        # As in megatron-core's gradient buffer: one expert after the other, in reverse, with something in between.
        buffer = floats((len(counts), O + 1, D), device, seed=2).float()
        before = buffer.clone()
        main_grads = [buffer[expert, :O] for expert in reversed(range(len(counts)))]
        assert (
            grouped_wgrad(grad, x, offsets_of(counts, device), main_grads=GradientTable.of(main_grads), **options)
            is None
        )
        want = before[:, :O].flip(0).double() + grouped_reference.grouped_wgrad(grad, x, offsets_of(counts, device))
        assert error(torch.stack(main_grads), want) < FLOAT32_SUMS
        assert torch.equal(buffer[:, O], before[:, O])


def test_wgrad_does_not_see_the_next_experts_infinities(device: str) -> None:
    grad, x = floats((50, 64), device), floats((50, 48), device, seed=1)
    grad[21:], x[21:] = torch.inf, torch.nan
    got = grouped_wgrad(grad, x, offsets_of([21, 29], device), config=SMALL)
    want = grouped_reference.grouped_wgrad(grad[:21], x[:21], offsets_of([21], device))
    assert error(got[:1], want) < FLOAT32_SUMS


def padded_codes(counts: list[int], features: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """(codes as [T, features], the same transposed with each expert filled up to 128 tokens; NaN past the last)."""
    codes = floats((sum(counts), features), "cpu", seed=seed).to(FP8)
    columns = pad_offsets(offsets_of(counts, "cpu")).tolist()
    packed = torch.full((features, columns[-1] + 128), torch.nan)
    packed[:, : columns[-1]] = 0.0
    for rows, column in zip(grouped_reference.expert_rows(offsets_of(counts, "cpu")), columns, strict=False):
        packed[:, column : column + rows.stop - rows.start] = codes[rows].float().t()
    return codes.to(device), packed.to(FP8).to(device)


def fp8_sums(tokens: int, device: str) -> float:
    """Hopper adds 32 products at a time to a sum cut off 13 bits below its largest term: on average half of that."""
    return FLOAT32_SUMS if device == "cpu" else 2**-10 + tokens / 32 * 2**-14


@pytest.mark.parametrize(("parts", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_fp8_wgrad_against_float64_of_the_same_codes(device: str, parts: int, dtype: torch.dtype) -> None:
    for counts, O, D, options in cases(device):
        (grad, grad_OT), (x, x_DT) = padded_codes(counts, O, device, 0), padded_codes(counts, D, device, 1)
        offsets, scale = offsets_of(counts, device), scales((len(counts), parts), device)
        padded = pad_offsets(offsets)
        want = grouped_reference.grouped_wgrad(grad.float(), x.float(), offsets)
        want *= scale.double().repeat_interleave(O // parts, 1)[:, :, None]
        bound = fp8_sums(max(counts), device) + (BF16_ROUNDING if dtype == torch.bfloat16 else 0.0)
        got = grouped_wgrad_fp8(grad_OT, x_DT, padded, scale_EP=scale, dtype=dtype, **options)
        assert got.dtype == dtype and error(got, want) < bound
        main_grad = floats(want.shape, device, seed=2).float()
        total, main_grads = main_grad.double() + want, list(main_grad)
        assert (
            grouped_wgrad_fp8(grad_OT, x_DT, padded, scale_EP=scale, main_grads=GradientTable.of(main_grads), **options)
            is None
        )
        assert error(main_grad, total) < bound


def good_arguments(device: str) -> dict[str, Tensor]:
    return {
        "codes_TD": integers(-128, 128, (20, 32), device),
        "weight_EOD": integers(-1, 2, (2, 16, 32), device),
        "offsets": offsets_of([5, 15], device),
        "x_scale_T": scales((20,), device),
        "weight_scale_EP": scales((2, 1), device),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codes_TD", lambda t: t.float(), r"codes_TD: dtype torch.float32, expected torch.int8"),
        ("codes_TD", lambda t: t[:, :24].contiguous(), r"last dimension 24, expected a positive multiple of 16"),
        ("codes_TD", lambda t: t.repeat(1, 2)[:, ::2], r"codes_TD: strides \(64, 2\) are not contiguous"),
        ("codes_TD", lambda t: torch.cat([t.flatten(), t[0]])[8:648].view(20, 32), r"is not a multiple of 16 bytes"),
        ("weight_EOD", lambda t: t[..., :16].contiguous(), r"shape \[2, 16, 16\], expected \[any, any, 32\]"),
        ("offsets", lambda t: t.long(), r"offsets: dtype torch.int64, expected torch.int32"),
        ("offsets", lambda t: t[:2], r"offsets: shape \[2\], expected \[3\]"),
        ("x_scale_T", lambda t: t[:, None], r"x_scale_T: shape \[20, 1\], expected \[20\]"),
        ("weight_scale_EP", lambda t: t.repeat(1, 3), r"weight_scale_EP: 3 parts, expected a divisor of the 16"),
    ],
)
def test_bad_arguments_of_the_forward(device: str, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    arguments = good_arguments(device)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        grouped_forward(**arguments)


def test_bad_arguments_of_the_gradients(device: str) -> None:
    grad, weight = floats((20, 96), device), floats((2, 96, 32), device)
    offsets = offsets_of([5, 15], device)
    with pytest.raises(ValueError, match=r"weight_scale_EP: parts of 48 features, expected a multiple of block_k=32"):
        grouped_dgrad(grad, weight, offsets, weight_scale_EP=scales((2, 2), device), config=SMALL)
    with pytest.raises(ValueError, match=r"weight_DEO: dtype torch.bfloat16, expected torch.float8_e4m3fn"):
        grouped_dgrad_fp8(grad.to(FP8), floats((32, 2, 96), device), offsets, grad_scale_T=scales((20,), device))
    with pytest.raises(ValueError, match=r"scale_EP: 5 parts, expected a divisor of the 96 output features"):
        codes = torch.zeros(96, 256, device=device).to(FP8)
        grouped_wgrad_fp8(codes, codes, pad_offsets(offsets), scale_EP=scales((2, 5), device))
    with pytest.raises(ValueError, match=r"x_TD: shape \[19, 32\], expected \[20, any\]"):
        grouped_wgrad(grad, floats((19, 32), device), offsets)
    x, main_grad = floats((20, 32), device), torch.zeros(2, 96, 32, device=device)
    with pytest.raises(ValueError, match=r"main_grads\[1\]: shape \[95, 32\], expected \[O, D\] as main_grads\[0\]"):
        GradientTable.of([main_grad[0], main_grad[1, 1:]])
    with pytest.raises(ValueError, match=r"main_grads\[0\]: dtype torch.float64, expected torch.float32"):
        GradientTable.of(list(main_grad.double()))
    with pytest.raises(ValueError, match=r"main_grads\[1\] is not contiguous"):
        GradientTable.of([main_grad[0], main_grad[1].t().contiguous().t()])
    with pytest.raises(ValueError, match=r"main_grads: \[E, O, D\] = \[1, 96, 32\], expected \[2, 96, 32\]"):
        grouped_wgrad(grad, x, offsets, main_grads=GradientTable.of([main_grad[0]]))
    with pytest.raises(ValueError, match=r"block_m=48: tiles are powers of two from 16 to 256"):
        TileConfig(block_m=48)
