"""The gates of `qsparse bench kernels` are green for right kernels and red for wrong ones, on small shapes."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import decode, grouped_gemm, ternarize
from kernels.dispatch import Backward, ReferenceKernels
from kernels.gemm import gemm
from kernels.sparsify import sparsify
from pipeline.bench.kernels.case import Check, relative_error
from pipeline.bench.kernels.decode import DecodeCase
from pipeline.bench.kernels.exact_ways import ExactWaysCase
from pipeline.bench.kernels.grouped import GroupedCase, Shape
from pipeline.bench.kernels.layer import LayerCase
from pipeline.bench.kernels.sparsify import SparsifyCase
from pipeline.bench.kernels.ternarize import TernarizeCase
from pipeline.bench.kernels.two_four import OURS, TwoFourCase


def failed(checks) -> list[str]:
    return [check.what for check in checks if not check.passed]


def test_sparsify_gate(device: str):
    def one_too_few(x: Tensor, kept: int | None, block: int | None):
        return sparsify(x, None if kept is None else kept - 1, block)

    def scale_off_by_a_bit(x: Tensor, kept: int | None, block: int | None):
        codes, scale = sparsify(x, kept, block)
        return codes, torch.nextafter(scale, scale + 1)

    assert failed(SparsifyCase(8, 128, device).checks()) == []
    wrong = failed(SparsifyCase(8, 128, device, function=one_too_few).checks())
    assert wrong == ["codes, top-k 50%", "codes, 16:32", "codes, 2:4"]
    assert len(failed(SparsifyCase(8, 128, device, function=scale_off_by_a_bit).checks())) == 4


def test_ternarize_gate(device: str):
    def one_flipped(table, scale, dtype):
        codes = ternarize.codes(table, scale, dtype)
        codes[3] = 1 - codes[3].abs()
        return codes

    assert failed(TernarizeCase(1, device, hidden=32, ffn=48).checks()) == []
    assert failed(TernarizeCase(1, device, hidden=32, ffn=48, function=one_flipped).checks()) != []


@dataclass
class Distorted:
    """Kernels of which one result is wrong."""

    what: str
    factor: float
    fused = None
    expander = None

    def sparsify(self, x, kept, block):
        return ReferenceKernels().sparsify(x, kept, block)

    def linear(self, x, weight, **options):
        y = ReferenceKernels().linear(x, weight, **options)
        return y * self.factor if self.what == "y" else y

    def backward(self, grad, weight, **options) -> Backward:
        return DistortedBackward(ReferenceKernels().backward(grad, weight, **options), self)


@dataclass
class DistortedBackward:
    right: Backward
    kernels: Distorted

    def dgrad(self) -> Tensor:
        return self.right.dgrad() * (self.kernels.factor if self.kernels.what == "dx" else 1)

    def wgrad(self, x, x_scale, main_grad):
        return self.right.wgrad(x, x_scale, main_grad) * (self.kernels.factor if self.kernels.what == "dw" else 1)


@pytest.mark.parametrize(("what", "wrong"), [("", 0), ("y", 2), ("dx", 2), ("dw", 2)])
def test_layer_gate(what, wrong):
    case = LayerCase(64, 48, 32, "cpu", kernels=Distorted(what, 1.02))
    names = failed(case.checks())
    assert len(names) == wrong
    assert all({"y": "output", "dx": "dX", "dw": "dW"}[what] in name for name in names)


def test_layer_gate_wants_the_same_bits_from_kept_weights():
    case = LayerCase(64, 48, 32, "cpu", kernels=ReferenceKernels(), keeping=Distorted("dx", 1.02))
    assert failed(case.checks()) == ["ours exact, bf16 weights kept: the bits of ours exact"]


def test_a_value_that_is_no_number_is_red():
    assert not Check("", float("nan"), 1.0).passed
    assert not Check("", relative_error(torch.ones(3), torch.zeros(3)), 1.0).passed


def test_relative_error_is_that_of_all_rows():
    torch.manual_seed(0)
    got, want = torch.randn(3000, 4), torch.randn(3000, 4)
    expected = float((got - want).norm() / want.norm())
    assert relative_error(got, want) == pytest.approx(expected, rel=1e-5)


def test_grouped_gate(device: str):
    def forgets_the_last_row(*args, **options):
        y = grouped_gemm.grouped_forward(*args, **options)
        y[-1] = 0
        return y

    shape = Shape(3, 40, 32, 48)
    # Floats are left out: the interpreter cuts off where the GPU rounds.
    assert "forward, int8" not in failed(GroupedCase(shape, device).checks())
    assert "forward, int8" in failed(GroupedCase(shape, device, forward=forgets_the_last_row).checks())


def test_decode_gate(device: str):
    def without_scale(x, weight, *, weight_scale_O, **options):
        return decode.ternary_gemv(x, weight, weight_scale_O=torch.ones_like(weight_scale_O), **options)

    small = {"sparsities": (0.0, 0.5), "rotation_bytes": 1}
    assert failed(DecodeCase(64, 48, 2, device, **small).checks()) == []
    wrong = failed(DecodeCase(64, 48, 2, device, gemv=without_scale, **small).checks())
    assert wrong == ["ternary gemv, 0% zeros", "ternary gemv, 50% zeros"]


def test_ways_of_the_exact_backward_agree(device: str):
    assert failed(ExactWaysCase(64, 48, 32, device).checks()) == []


def test_two_four_gate(device: str):
    def rounded(codes, ternary, **scales):
        return gemm(codes, ternary, dtype=torch.float32, **scales).bfloat16()  # the interpreter would cut off

    def half(codes, ternary, **scales):
        return rounded(codes, ternary, **scales) / 2

    assert failed(TwoFourCase(64, 48, 16, device, product=rounded).checks()) == []
    assert failed(TwoFourCase(64, 48, 16, device, product=half).checks()) == [OURS]
