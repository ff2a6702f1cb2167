"""8-bit operands of the backward products against float64, and the products they are for."""

import pytest
import torch
from torch import Tensor

from kernels import gradients, reference

E4M3_ROUNDING = 2.0**-4
"""Half a unit in the last of e4m3's 4 significant bits, relative."""


def sample(tokens: int, outputs: int, features: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dY with tokens of very different size, codes, their scale, a scale per output feature."""
    generator = torch.Generator().manual_seed(tokens + outputs)
    size = torch.exp(2 * torch.randn(tokens, 1, generator=generator))
    grad = (torch.randn(tokens, outputs, generator=generator) * size).bfloat16()
    codes = torch.randint(-127, 128, (tokens, features), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(tokens, 1, generator=generator) + 0.1
    weight_scale = torch.rand(outputs, generator=generator) + 0.1
    return grad.to(device), codes.to(device), x_scale.to(device), weight_scale.to(device)


def sizes(device: str) -> list[tuple[int, int, int]]:
    return [(63, 100, 40), (16, 256, 64), (1, 300, 33)] + ([(1000, 4096, 2048)] if device == "cuda" else [])


@pytest.mark.parametrize("per_output", [False, True])
def test_gradient_codes_reproduce_the_gradient(per_output: bool, device: str) -> None:
    for tokens, outputs, features in sizes(device):
        grad, _, x_scale, weight_scale = sample(tokens, outputs, features, device)
        exact = grad.double() * (weight_scale.double() if per_output else 1.0)
        quantized = gradients.quantize_gradient(grad, x_scale, weight_scale if per_output else None)
        restored = quantized.codes_TO.double() * quantized.scale_T1.double()
        largest = exact.abs().amax(-1, keepdim=True)
        if device == "cuda":  # the interpreter loses the carry where rounding reaches the next power of two
            smallest_normal = largest / 448 * 2.0**-6
            bound = E4M3_ROUNDING * torch.maximum(exact.abs(), smallest_normal) * 1.001
            assert ((restored - exact).abs() <= bound).all()
        assert (restored - exact).norm() / exact.norm() < 0.2
        assert torch.equal(quantized.transposed_OT.float(), quantized.codes_TO.float().t())
        torch.testing.assert_close(quantized.scale_T1.double(), largest / 448, rtol=1e-6, atol=0)
        common = (largest / 448 * x_scale.double()).max() * 127 / 448
        torch.testing.assert_close(quantized.common[0].double(), common, rtol=1e-6, atol=0)


def test_weight_gradient_from_8_bit_operands(device: str) -> None:
    for tokens, outputs, features in sizes(device):
        if tokens == 1:
            continue
        grad, codes, x_scale, _ = sample(tokens, outputs, features, device)
        quantized = gradients.quantize_gradient(grad, x_scale, None)
        x = gradients.transposed_input(codes, x_scale, quantized)
        assert x.shape == (features, tokens) and x.float().abs().max() <= 448
        dw = quantized.common.double() * (quantized.transposed_OT.double() @ x.double().t())
        exact = grad.double().t() @ (codes.double() * x_scale.double())
        assert (dw - exact).norm() / exact.norm() < (0.05 if device == "cuda" else 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_output", [False, True])
def test_codes_and_scales_are_the_references(per_output: bool, dtype: torch.dtype, device: str) -> None:
    for tokens, outputs in [(7, 100), (5, 3000), (1, 17000)] + ([(1000, 4096)] if device == "cuda" else []):
        grad, _, _, weight_scale = sample(tokens, outputs, 16, device)
        several = weight_scale if per_output else None
        codes, scale = gradients.round_gradient(grad.to(dtype), several)
        expected, expected_scale = reference.e4m3_gradient(grad.to(dtype), several)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        quotient = grad.float() * (weight_scale if per_output else 1.0) / expected_scale
        farther = (codes.float() - quotient).abs() - (expected - quotient).abs()
        if device == "cpu":  # the interpreter loses carries to the next power of two, and bits of subnormal codes
            farther[(expected.frexp().mantissa.abs() == 0.5) | (expected.abs() < 2.0**-6)] = 0.0
        # either code will do for a quotient halfway between them: the kernel multiplies by 1 / scale
        assert (farther <= 1e-6 * quotient.abs()).all()


@pytest.mark.parametrize("per_output", [False, True])
def test_rounding_does_not_depend_on_the_launch(per_output: bool, device: str) -> None:
    grad, _, _, weight_scale = sample(7, 600, 16, device)
    several = weight_scale if per_output else None
    expected = gradients.round_gradient(grad, several)
    for lines, columns in [(64, 4), (32, 8), (128, 8), (64, 16)]:
        launch = {"WHOLE": lines * columns >= 600, "LINES": lines, "COLUMNS": columns, "num_warps": 2}
        found = gradients.round_gradient(grad, several, launch=launch)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True)), launch


@pytest.mark.parametrize("per_output", [False, True])
def test_a_gradient_that_was_sent_is_the_one_rounded_in_place(per_output: bool, device: str) -> None:
    for tokens, outputs, _ in [*sizes(device), (0, 48, 16), (5, 5000, 16)]:
        grad, _, x_scale, weight_scale = sample(tokens, outputs, 16, device)
        several = weight_scale if per_output else None
        expected = gradients.quantize_gradient(grad, x_scale, several)
        parts = [gradients.round_gradient(part, several) for part in grad.tensor_split(2)]
        codes, scale = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        found = gradients.gathered_gradient(codes, scale, x_scale)
        for name in ("codes_TO", "transposed_OT", "scale_T1", "common"):
            assert torch.equal(getattr(found, name).float(), getattr(expected, name).float()), name


def test_transposed_weight_is_exact(device: str) -> None:
    codes = torch.randint(-1, 2, (100, 70), dtype=torch.int8, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(gradients.transposed_weight(codes).float(), codes.t().float())


def test_dequantize(device: str) -> None:
    for rows, features in [(5, 100), (3, 5000), (2, 16)]:
        codes = torch.randint(-127, 128, (rows, features), dtype=torch.int8).to(device)
        scale = torch.rand(rows, 1).to(device)
        got = gradients.dequantize(codes, scale, torch.float32)
        assert torch.equal(got, codes.float() * scale)
        assert torch.equal(gradients.dequantize(codes, None), codes.bfloat16())


@pytest.mark.parametrize("per_output", [False, True])
def test_a_gradient_of_zeros_and_one_that_is_not_finite(per_output: bool, device: str) -> None:
    x_scale = torch.ones(4, 1, device=device)
    several = torch.ones(32, device=device) if per_output else None
    zeros = gradients.quantize_gradient(torch.zeros(4, 32, dtype=torch.bfloat16, device=device), x_scale, several)
    assert zeros.codes_TO.float().count_nonzero() == 0 and zeros.scale_T1.isfinite().all()
    grad = torch.ones(4, 32, dtype=torch.bfloat16, device=device)
    grad[2, 5] = torch.nan
    bad = gradients.quantize_gradient(grad, x_scale, several)
    assert not bad.common.isfinite()
    assert not (bad.codes_TO.float() * bad.scale_T1)[2].isfinite().all()
    assert (bad.codes_TO.float() * bad.scale_T1)[0].isfinite().all()


def test_bad_input_is_refused_before_the_launch(device: str) -> None:
    grad = torch.zeros(4, 32, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="x_scale has 3 numbers for 4 tokens"):
        gradients.quantize_gradient(grad, torch.ones(3, 1, device=device), None)
    with pytest.raises(ValueError, match="weight_scale has 3 numbers for 32 output features"):
        gradients.quantize_gradient(grad, torch.ones(4, 1, device=device), torch.ones(3, device=device))
    with pytest.raises(ValueError, match="weight_scale has 3 numbers for 32 output features"):
        gradients.round_gradient(grad, torch.ones(3, device=device))
    with pytest.raises(ValueError, match="x_scale has 3 numbers for 4 tokens"):
        gradients.gathered_gradient(*gradients.round_gradient(grad, None), torch.ones(3, 1, device=device))
    with pytest.raises(ValueError, match=r"codes is torch.bfloat16, the kernel takes torch.float8_e4m3fn"):
        gradients.gathered_gradient(grad, torch.ones(4, 1, device=device), torch.ones(4, 1, device=device))
    with pytest.raises(ValueError, match=r"codes is torch.bfloat16, the kernel takes torch.int8"):
        gradients.transposed_weight(grad)
    with pytest.raises(ValueError, match=r"codes is torch.float8_e4m3fn, the kernel takes torch.int8"):
        gradients.transposed_weight(grad.to(torch.float8_e4m3fn))
