"""Decode products against the reference: ternary ones bit for bit, bf16 ones within the rounding of their sums."""

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.decode import TERNARY_STEPS, DotConfig, GemvConfig, Workspace, float_gemv, ternary_dot, ternary_gemv
from kernels.packing import PackedTernary, pack_ternary

SHAPES = [(1, 100, 63), (2, 35, 600)]
GPU_SHAPES = [(1, 14336, 4096), (4, 4096, 14336), (16, 4000, 4096), (16, 63, 100), (3, 63, 1000)]
GEMV_CONFIGS = (
    None,
    GemvConfig(splits=3, num_warps=2),
    GemvConfig(splits=2, num_warps=1, chunks=3, overlap=False),
    GemvConfig(splits=5, num_warps=8),
)
ONE_WARP = GemvConfig(num_warps=1)
SMALL_DOT = DotConfig(block_outputs=32, block_words=16, splits=2, num_warps=2, num_stages=2)
KINDS = ("normal", "heavy", "zero", "constant")


def activations(kind: str, num_tokens: int, num_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens + num_features)
    x_TD = torch.randn(num_tokens, num_features, generator=generator)
    match kind:
        case "heavy":
            return x_TD / torch.rand(num_tokens, num_features, generator=generator).clamp(min=1e-4) ** 2
        case "zero":
            return torch.zeros_like(x_TD)
        case "constant":
            return torch.full_like(x_TD, -0.75)
    return x_TD


class Case:
    """Operands of one product; half of the codes are zeros, exactly as top-K leaves them."""

    def __init__(self, kind: str, shape: tuple[int, int, int], device: str) -> None:
        num_tokens, num_features, num_outputs = shape
        generator = torch.Generator().manual_seed(num_outputs)
        weight_OD = torch.randn(num_outputs, num_features, generator=generator)
        x_TD = activations(kind, num_tokens, num_features)
        x_scale_T1 = reference.row_scale(x_TD.abs().amax(-1, keepdim=True))
        codes_TD = reference.absmax_codes(x_TD, x_scale_T1)
        codes_TD = reference.apply_mask(codes_TD, reference.topk_mask(codes_TD, max(1, num_features // 2)))
        ternary_OD = reference.ternary_codes(weight_OD, weight_OD.abs().mean())
        weight_scale_O = torch.rand(num_outputs, generator=generator) + 0.5
        self.codes_TD, self.ternary_OD = codes_TD.to(device), ternary_OD.to(device)
        self.scales = {"x_scale_T1": x_scale_T1.to(device), "weight_scale_O": weight_scale_O.to(device)}
        self.expected = reference.linear(self.codes_TD, self.ternary_OD, **self.scales, dtype=torch.bfloat16)
        self.poisoned = torch.full_like(self.expected, float("nan"))


def shapes(device: str) -> list[tuple[int, int, int]]:
    return SHAPES if device == "cpu" else GPU_SHAPES


def with_enough_turns(config: GemvConfig, num_features: int) -> GemvConfig:
    """`config` in as many turns as `num_features` take, of half the default's steps: compiling is 5 times faster."""
    features_per_turn = 4 * config.splits * config.num_warps * TERNARY_STEPS // 2
    return replace(config, chunks=max(config.chunks, ceil(num_features / features_per_turn)))


@pytest.mark.parametrize("kind", KINDS)
def test_gemv_is_bit_equal_to_the_reference(kind: str, device: str) -> None:
    for shape in shapes(device):
        case = Case(kind, shape, device)
        weight = pack_ternary(case.ternary_OD, layout="column")
        for config in GEMV_CONFIGS if kind == "normal" else [None]:  # which divide the features, not the values
            config = config and with_enough_turns(config, shape[1])
            found = ternary_gemv(case.codes_TD, weight, **case.scales, config=config, out=case.poisoned.clone())
            assert torch.equal(found, case.expected), (shape, config)


@pytest.mark.parametrize("kind", KINDS)
def test_dot_is_bit_equal_to_the_reference(kind: str, device: str) -> None:
    for shape in shapes(device):
        case = Case(kind, shape, device)
        weight = pack_ternary(case.ternary_OD, layout="row")
        for config in (None, SMALL_DOT, replace(SMALL_DOT, splits=1, block_outputs=64, num_warps=4)):
            found = ternary_dot(case.codes_TD, weight, **case.scales, config=config, out=case.poisoned.clone())
            assert torch.equal(found, case.expected), (shape, config)


@pytest.mark.parametrize("num_tokens", range(1, 17))
def test_every_number_of_tokens(num_tokens: int, device: str) -> None:
    case = Case("normal", (num_tokens, 18, 70), device)
    for product, layout in ((ternary_gemv, "column"), (ternary_dot, "row")):
        found = product(case.codes_TD, pack_ternary(case.ternary_OD, layout=layout), **case.scales)  # type: ignore[operator]
        assert torch.equal(found, case.expected), layout


@pytest.mark.parametrize("weight", [1, -1])
def test_largest_sums_leave_the_count_of_arrivals_alone(weight: int, device: str) -> None:
    """Partial sums of the extreme code, the most splits that fit, signs that differ between neighbours."""
    codes_TD = torch.full((1, 256), -128, dtype=torch.int8, device=device)
    ternary_OD = torch.full((256, 256), weight, dtype=torch.int8, device=device)
    ternary_OD[::2] = -weight
    ternary_OD[128:] *= -1
    ones = {"x_scale_T1": torch.ones(1, 1, device=device), "weight_scale_O": torch.ones(256, device=device)}
    expected = reference.linear(codes_TD, ternary_OD, **ones, dtype=torch.bfloat16)
    packed = pack_ternary(ternary_OD, layout="column")
    for config in (GemvConfig(splits=1, num_warps=1, chunks=4), GemvConfig(splits=16383 if device == "cuda" else 6)):
        assert torch.equal(ternary_gemv(codes_TD, packed, **ones, config=config), expected), config
    assert torch.equal(ternary_dot(codes_TD, pack_ternary(ternary_OD, layout="row"), **ones), expected)


def test_codes_that_are_not_aligned_to_words(device: str) -> None:
    case = Case("normal", (1, 101, 70), device)
    codes_TD = torch.cat([case.codes_TD.new_zeros(1), case.codes_TD.flatten()])[1:].view(1, -1)
    found = ternary_gemv(codes_TD, pack_ternary(case.ternary_OD, layout="column"), **case.scales)
    assert torch.equal(found, case.expected)


def test_a_workspace_is_left_clean_and_serves_smaller_products(device: str) -> None:
    workspace = Workspace.allocate(device, num_sums=16 * 1024, num_arrivals=64)
    for shape in ((3, 100, 300), (1, 63, 100), (3, 100, 300)):
        case = Case("normal", shape, device)
        for product, layout in ((ternary_gemv, "column"), (ternary_dot, "row")):
            weight = pack_ternary(case.ternary_OD, layout=layout)  # type: ignore[arg-type]
            found = product(case.codes_TD, weight, **case.scales, workspace=workspace)  # type: ignore[operator]
            assert torch.equal(found, case.expected)
            assert not workspace.sums.any() and not workspace.arrivals.any()


@pytest.mark.parametrize("shape", [(1, 63, 100), (3, 300, 70), (16, 63, 65)])
def test_float_gemv_equals_a_float64_product_and_repeats_itself(shape: tuple[int, int, int], device: str) -> None:
    num_tokens, num_features, num_outputs = shape
    x_TD = activations("normal", num_tokens, num_features).bfloat16().to(device)
    x_TD = reference.apply_mask(x_TD, reference.topk_mask(x_TD, num_features // 2))
    weight_DO = torch.randn(num_features, num_outputs, generator=torch.Generator().manual_seed(0))
    weight_DO = weight_DO.bfloat16().to(device)
    exact = x_TD.double() @ weight_DO.double()
    # Sums of n float32 terms are off by at most n eps sum |x w|; rounding to bf16 adds 2^-8 relative at most.
    bound = num_features * 2**-23 * (x_TD.double().abs() @ weight_DO.double().abs()) + 2**-8 * exact.abs()
    for config in GEMV_CONFIGS:
        poisoned = torch.full_like(exact, float("nan"), dtype=torch.bfloat16)
        found = float_gemv(x_TD, weight_DO, config=config, out=poisoned)
        assert ((found.double() - exact).abs() <= bound).all()
        assert torch.equal(found, float_gemv(x_TD, weight_DO, config=config))


def test_skipped_weights_are_not_read(device: str) -> None:
    """NaN weights of zero activations would reach the output if they were multiplied."""
    x_TD = torch.tensor([[0.0, 1.0, -0.0, 2.0]], dtype=torch.bfloat16, device=device)
    weight_DO = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
    weight_DO[0::2] = float("nan")
    assert torch.equal(float_gemv(x_TD, weight_DO), torch.full((1, 64), 3.0, dtype=torch.bfloat16, device=device))


def small(device: str) -> tuple[Case, PackedTernary]:
    case = Case("normal", (2, 64, 32), device)
    return case, pack_ternary(case.ternary_OD, layout="column")


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    (r"x_TD: dtype torch\.int32, expected torch\.int8", {"x_TD": torch.zeros(2, 64, dtype=torch.int32)}),
    (r"x_TD: shape \[2, 63\], expected \[any, 64\]", {"x_TD": torch.zeros(2, 63, dtype=torch.int8)}),
    (r"x_TD: strides .* not contiguous", {"x_TD": torch.zeros(64, 2, dtype=torch.int8).t()}),
    ("tokens of x_TD: 17, expected 1 to 16", {"x_TD": torch.zeros(17, 64, dtype=torch.int8)}),
    (r"x_scale_T1: shape \[2\], expected \[2, 1\]", {"x_scale_T1": torch.ones(2)}),
    (r"weight_scale_O: dtype torch\.float64", {"weight_scale_O": torch.ones(32, dtype=torch.float64)}),
    (r"out: dtype torch\.float32, expected torch\.bfloat16", {"out": torch.empty(2, 32)}),
    ("workspace.sums: 5 entries, expected at least 64", {"workspace": (5, 64)}),
    (r"config\.splits=65536: expected at most 65535 for 64 features", {"config": GemvConfig(splits=65536)}),
]


@pytest.mark.parametrize(("message", "changed"), MISTAKES, ids=[message for message, _ in MISTAKES])
def test_mistakes_name_the_argument_and_the_value(message: str, changed: dict[str, Any], device: str) -> None:
    case, weight = small(device)
    arguments: dict[str, Any] = {"x_TD": case.codes_TD, **case.scales, **changed}
    arguments = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    if isinstance(sizes := arguments.get("workspace"), tuple):
        arguments["workspace"] = Workspace.allocate(device, num_sums=sizes[0], num_arrivals=sizes[1])
    with pytest.raises(ValueError, match=message):
        ternary_gemv(arguments.pop("x_TD"), weight, **arguments)


def test_mistakes_in_layout_workspace_and_configuration(device: str) -> None:
    case, weight = small(device)
    with pytest.raises(ValueError, match="weight: layout 'column', expected 'row'"):
        ternary_dot(case.codes_TD, weight, **case.scales)
    with pytest.raises(ValueError, match=r"weight\.words: shape \[64, 16\], expected \[65, 16\]"):
        ternary_gemv(case.codes_TD, replace(weight, in_features=65), **case.scales)
    with pytest.raises(ValueError, match="num_warps=3: expected a power of two"):
        GemvConfig(num_warps=3)
    with pytest.raises(ValueError, match="splits=0: expected at least 1"):
        GemvConfig(splits=0)
    with pytest.raises(ValueError, match="block_outputs=8: expected at least 16"):
        DotConfig(block_outputs=8)
    with pytest.raises(ValueError, match="75 rows per warp and turn, expected at most 64: raise chunks"):
        float_gemv(torch.ones(1, 75).bfloat16().to(device), torch.ones(75, 8).bfloat16().to(device), config=ONE_WARP)
    floats_TD, weight_DO = case.codes_TD.bfloat16(), torch.zeros(64, 32, device=device)
    with pytest.raises(ValueError, match=r"weight_DO: dtype torch\.float32, expected torch\.bfloat16"):
        float_gemv(floats_TD, weight_DO)
    arrivals = Workspace.allocate(device, num_sums=0, num_arrivals=1)
    with pytest.raises(ValueError, match=r"workspace\.arrivals: 1 entries, expected at least 2"):
        float_gemv(floats_TD, weight_DO.bfloat16(), workspace=arrivals)
