"""8-bit operands of the grouped backward products against float64, and the two products they are for."""

# ruff: noqa: E741 - O is a dimension
import pytest
import torch
from torch import Tensor

from kernels import grouped_gradients, grouped_reference
from kernels.grouped_gemm import grouped_dgrad_fp8
from kernels.grouped_wgrad import grouped_wgrad_fp8, pad_offsets, padded_columns
from kernels.tile_launch import TileConfig

SMALL = TileConfig(32, 64, 32, num_warps=4, num_stages=2, group_m=2)
E4M3_ROUNDING = 2.0**-4
"""Half a unit in the last of e4m3's 4 significant bits, relative."""
# (token counts of the experts, output features, input features, parts of the weight)
CASES = [([63], 48, 40, 1), ([0, 130, 1, 0], 96, 64, 2), ([5, 0, 17, 40], 112, 33, 1)]
LARGE_CASES = [([1000, 3, 0, 2045, 129], 1408, 1024, 2), ([0, 0, 3000], 512, 700, 1)]


def cases(device: str) -> list[tuple[list[int], int, int, int]]:
    return CASES + (LARGE_CASES if device == "cuda" else [])


class Sample:
    """dY with tokens and experts of very different size, codes, scales."""

    def __init__(self, counts: list[int], outputs: int, features: int, parts: int, device: str) -> None:
        tokens, experts = sum(counts), len(counts)
        generator = torch.Generator().manual_seed(tokens + outputs)
        size = torch.exp(2 * torch.randn(tokens, 1, generator=generator))
        self.expert_T = torch.arange(experts).repeat_interleave(torch.tensor(counts)).to(device)
        self.offsets = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
        grad = torch.randn(tokens, outputs, generator=generator) * size
        self.grad_TO = grad.bfloat16().to(device) * (10.0**self.expert_T)[:, None].bfloat16()
        self.codes_TD = torch.randint(-127, 128, (tokens, features), generator=generator, dtype=torch.int8).to(device)
        self.weight_EOD = torch.randint(-1, 2, (experts, outputs, features), generator=generator).to(torch.int8)
        self.weight_EOD = self.weight_EOD.to(device)
        self.x_scale_T = (torch.rand(tokens, generator=generator) + 0.1).to(device)
        self.weight_scale_EP = (torch.rand(experts, parts, generator=generator) + 0.1).to(device)

    def quantized(self) -> grouped_gradients.GroupedGradient:
        return grouped_gradients.quantize_gradient(
            self.grad_TO, self.offsets, x_scale_T=self.x_scale_T, weight_scale_EP=self.weight_scale_EP
        )

    def scaled_grad(self) -> Tensor:
        """dY s_w in float64."""
        repeats = self.grad_TO.shape[1] // self.weight_scale_EP.shape[1]
        return self.grad_TO.double() * self.weight_scale_EP.double().repeat_interleave(repeats, 1)[self.expert_T]


def unpadded(packed: Tensor, offsets: Tensor) -> Tensor:
    """Rows of tokens from padded columns, after a look at the zeros between them."""
    padded = pad_offsets(offsets).tolist()
    found = []
    for expert, rows in enumerate(grouped_reference.expert_rows(offsets)):
        columns = packed[:, padded[expert] : padded[expert + 1]].float()
        count = rows.stop - rows.start
        assert columns[:, count:].count_nonzero() == 0
        found.append(columns[:, :count].t())
    return torch.cat(found)


def test_codes_and_scales(device: str) -> None:
    for case in cases(device):
        sample = Sample(*case, device)
        exact, got = sample.scaled_grad(), sample.quantized()
        scale_T = exact.abs().amax(1) / 448
        torch.testing.assert_close(got.scale_T.double(), scale_T, rtol=1e-6, atol=0)
        common = torch.full_like(sample.weight_scale_EP[:, 0], 1e-30).double()
        common.scatter_reduce_(0, sample.expert_T, scale_T * sample.x_scale_T.double() * 127 / 448, "amax")
        torch.testing.assert_close(got.common_E.double(), common, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.wgrad_scale_EP, got.common_E[:, None] / sample.weight_scale_EP)
        restored = got.codes_TO.double() * got.scale_T.double()[:, None]
        if device == "cuda":  # the interpreter loses the carry where rounding reaches the next power of two
            bound = E4M3_ROUNDING * torch.maximum(exact.abs(), scale_T[:, None] * 2.0**-6) * 1.001
            assert ((restored - exact).abs() <= bound).all()
        assert (restored - exact).norm() / exact.norm() < 0.2
        assert got.transposed_OT.shape == (case[1], padded_columns(sum(case[0]), len(case[0])))
        assert torch.equal(unpadded(got.transposed_OT, sample.offsets), got.codes_TO.float())


def test_transposed_input_holds_the_scales(device: str) -> None:
    for case in cases(device):
        sample = Sample(*case, device)
        gradient = sample.quantized()
        got = unpadded(grouped_gradients.transposed_input(sample.codes_TD, sample.x_scale_T, gradient), sample.offsets)
        factor = gradient.scale_T.double() * sample.x_scale_T.double() / gradient.common_E.double()[sample.expert_T]
        want = sample.codes_TD.double() * factor[:, None]
        assert got.abs().max() <= 448
        if device == "cuda":  # see above
            bound = 1.001 * E4M3_ROUNDING * want.abs().clamp(min=2.0**-6)
            assert ((got.double() - want).abs() <= bound).all()
        assert (got.double() - want).norm() / want.norm() < 0.2


def test_both_products_of_the_backward(device: str) -> None:
    options = {"config": SMALL} if device == "cpu" else {}
    for counts, O, D, parts in cases(device):
        D = D // 16 * 16
        sample = Sample(counts, O, D, parts, device)
        gradient = sample.quantized()
        weight_DEO = grouped_gradients.transposed_weight(sample.weight_EOD)
        assert torch.equal(weight_DEO.float(), sample.weight_EOD.permute(2, 0, 1).float())
        dx = grouped_dgrad_fp8(gradient.codes_TO, weight_DEO, sample.offsets, grad_scale_T=gradient.scale_T, **options)
        x_DT = grouped_gradients.transposed_input(sample.codes_TD, sample.x_scale_T, gradient)
        dw = grouped_wgrad_fp8(
            gradient.transposed_OT, x_DT, gradient.padded_offsets, scale_EP=gradient.wgrad_scale_EP, **options
        )
        x = sample.codes_TD.double() * sample.x_scale_T.double()[:, None]
        exact = {
            "dx": grouped_reference.grouped_dgrad(
                sample.grad_TO, sample.weight_EOD, sample.offsets, weight_scale_EP=sample.weight_scale_EP
            ),
            "dw": grouped_reference.grouped_wgrad(sample.grad_TO, x, sample.offsets),
        }
        groups = {"dx": grouped_reference.expert_rows(sample.offsets), "dw": list(range(len(counts)))}
        for name, got in (("dx", dx), ("dw", dw)):  # expert by expert: a loud one must not hide a quiet one
            for group in groups[name]:
                error, norm = (got[group].double() - exact[name][group]).norm(), exact[name][group].norm()
                assert error <= (0.06 if device == "cuda" else 0.2) * norm, (name, group)


def test_a_gradient_of_zeros_and_one_that_is_not_finite(device: str) -> None:
    sample = Sample([3, 2], 32, 16, 1, device)
    sample.grad_TO[:3] = 0.0
    sample.grad_TO[4, 7] = torch.nan
    got = sample.quantized()
    assert got.codes_TO[:3].float().count_nonzero() == 0 and got.scale_T[:4].isfinite().all()
    x = grouped_gradients.transposed_input(sample.codes_TD, sample.x_scale_T, got).float()
    assert x[:, :3].isfinite().all()
    restored = got.codes_TO.float() * got.scale_T[:, None]
    assert restored[:4].isfinite().all() and not restored[4].isfinite().all()


def test_bad_input_is_refused_before_the_launch(device: str) -> None:
    sample = Sample([3, 2], 32, 16, 1, device)
    with pytest.raises(ValueError, match=r"weight_scale_EP: 3 parts, expected a divisor of the 32 output features"):
        sample.weight_scale_EP = torch.ones(2, 3, device=device)
        sample.quantized()
    with pytest.raises(ValueError, match=r"grad_TO: 24 output features, expected a multiple of 16"):
        sample.grad_TO, sample.weight_scale_EP = sample.grad_TO[:, :24].contiguous(), torch.ones(2, 1, device=device)
        sample.quantized()
    with pytest.raises(ValueError, match=r"x_scale_T: shape \[5, 1\], expected \[5\]"):
        sample.x_scale_T = sample.x_scale_T[:, None]
        sample.quantized()
    with pytest.raises(ValueError, match=r"weight_EOD: 24 output features, expected a multiple of 16"):
        grouped_gradients.transposed_weight(sample.weight_EOD[:, :24].contiguous())
