"""The linear layer on Triton's kernels against the reference path: exact and 8-bit backward, fused fronts, one norm."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels.dispatch import Activation, Expanded, Kernels, ReferenceKernels, kernels_for
from kernels.triton_kernels import TritonKernels, WeightExpander
from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import Front, LinearCall, Operand, TernaryCache, WeightParts
from qsparse_layers.mlp import activate
from qsparse_layers.norm import RMSNorm, rms_norm
from qsparse_layers.sharded import fused_for

TOPK = LinearFormat(sparsity=0.5, weights="ternary", activations="int8")
FORMATS = {
    "topk": TOPK,
    "block": TOPK.model_copy(update={"pattern": "block", "block_size": 16}),
    "e4m3": TOPK.model_copy(update={"gradients": "e4m3"}),
    "weights only": LinearFormat(weights="ternary"),
    "activations only": LinearFormat(sparsity=0.5, activations="int8"),
    "sparse only": LinearFormat(sparsity=0.5),
}
QUANTIZED, FLOATS = LinearFormat(weights="ternary", activations="int8"), LinearFormat(weights="ternary")
EPS = 1e-5


def draw(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def run(layout: LinearFormat, parts: WeightParts, kernels: Kernels, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = draw(3, 8, 64, device=device), draw(48, 64, device=device, seed=1)
    x, weight = x.requires_grad_(), (weight * torch.linspace(1, 3, 48, device=device)[:, None]).bfloat16()
    weight = weight.detach().requires_grad_()
    y = qsparse_linear(x, weight, LinearCall(layout, parts, sparsity=layout.sparsity, kernels=kernels))
    y.backward(draw(3, 8, 48, device=device, seed=2))
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("parts", [WeightParts(1, (48,)), WeightParts(2, (8, 16))], ids=["one part", "two parts"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_on_triton_is_the_layer_on_the_reference(name: str, parts: WeightParts, device: str) -> None:
    expected = run(FORMATS[name], parts, ReferenceKernels(), device)
    found = run(FORMATS[name], parts, TritonKernels(), device)
    rounding = 2.0**-8 if device == "cuda" else 2.0**-7  # the interpreter cuts off what it writes as bf16
    assert error(found[0], expected[0]) < rounding
    if device == "cuda" and FORMATS[name].weights == "ternary" and FORMATS[name].activations == "int8":
        assert torch.equal(found[0], expected[0])
    # The interpreter's e4m3 loses carries: tests/kernels/test_gradients.py.
    tolerance = 0.25 if name == "e4m3" and device == "cpu" else 0.01
    assert error(found[1], expected[1]) < tolerance
    assert error(found[2], expected[2]) < tolerance


@pytest.mark.parametrize(
    ("layout", "parts"),
    [(QUANTIZED, WeightParts(1, (16, 16))), (FLOATS, WeightParts(1, (16, 16))), (FLOATS, WeightParts(1, (32,)))],
    ids=["codes", "floats, two parts", "floats, one part"],
)
def test_a_weight_kept_in_bf16_changes_no_bit(
    layout: LinearFormat, parts: WeightParts, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two microbatches of one version; the second kind brings its weight to bf16 once, the first in each of them."""
    made: list[Tensor] = []

    def expand(self: WeightExpander, codes: Tensor, scale: Tensor) -> Expanded:
        made.append(codes)
        return expand_codes(self, codes, scale)

    expand_codes = WeightExpander.expand
    monkeypatch.setattr(WeightExpander, "expand", expand)
    results = []
    for kernels, passes in ((TritonKernels(), 2), (TritonKernels(keep_bf16_weights=True), 1)):
        call = LinearCall(
            layout,
            parts,
            kernels=kernels,
            cache=TernaryCache(),
            weight_version=1,
            expander=kernels.expander,
        )
        x, weight = draw(16, 32, device=device).requires_grad_(), draw(32, 32, device=device, seed=1).requires_grad_()
        outputs = [qsparse_linear(x, weight, call) for _ in range(2)]
        (outputs[0] + outputs[1]).backward(draw(16, 32, device=device, seed=2))
        assert len(made) == passes
        made.clear()
        results.append((outputs[0].detach(), x.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        assert found is not None and torch.equal(found, expected)


def test_a_weight_without_version_is_not_kept(device: str) -> None:
    """Its codes are made in every forward pass: copies of all of them would lie there until the backward pass."""
    expander = WeightExpander()
    cache, codes = (
        TernaryCache(),
        Operand(torch.ones(16, 16, dtype=torch.int8, device=device), torch.ones(1, device=device)),
    )
    assert cache.get(None, lambda: codes, expander).expanded is None
    kept = cache.get(1, lambda: codes, expander)
    assert kept.expanded is not None and torch.equal(kept.expanded.values, codes.values.bfloat16())
    assert cache.get(1, lambda: codes, expander) is kept


def activated(x: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return x
    if activation == "relu2":
        return torch.relu(x) ** 2
    gate, up = x.chunk(2, dim=-1)
    return (torch.relu(gate) ** 2 if activation == "relu2_glu" else torch.nn.functional.silu(gate)) * up


@pytest.mark.parametrize(
    ("activation", "norm"), [("relu2_glu", True), ("relu2", False), ("swiglu", True), (None, True)]
)
def test_a_fused_front_is_the_chain_of_layers(activation: Activation | None, norm: bool, device: str) -> None:
    width = 128 if activation in ("relu2_glu", "swiglu") else 64
    kernels = TritonKernels()
    assert kernels.fused is not None
    call = LinearCall(TOPK, WeightParts(1, (48,)), sparsity=0.5, kernels=kernels)
    results = []
    for is_fused in (True, False):
        x, weight = (
            draw(5, 2, width, device=device).requires_grad_(),
            draw(48, 64, device=device, seed=1).requires_grad_(),
        )
        gain = (draw(64, device=device, seed=3).abs() + 0.5).requires_grad_() if norm else None
        if is_fused:
            y = qsparse_linear(x, weight, call, Front(kernels.fused, activation, EPS), gain)
        else:
            hidden = activated(x, activation)
            y = qsparse_linear(hidden if gain is None else rms_norm(hidden, gain, 64, EPS), weight, call)
        y.backward(draw(5, 2, 48, device=device, seed=2))
        results.append([y.detach(), x.grad, weight.grad] + ([] if gain is None else [gain.grad]))
    for found, expected in zip(*results, strict=True):
        assert found is not None and expected is not None
        assert error(found, expected) < (0.01 if device == "cuda" else 0.05)


def test_norm(device: str, to_bf16: Callable[[Tensor], Tensor]) -> None:
    kernels = TritonKernels()
    x, gain, grad = draw(7, 100, device=device), draw(100, device=device, seed=1), draw(7, 100, device=device, seed=2)
    wide, wide_gain = x.double().requires_grad_(), gain.double().requires_grad_()
    expected = rms_norm(wide, wide_gain, 100, EPS)
    expected.backward(grad.double())
    module = RMSNorm.__new__(RMSNorm)
    torch.nn.Module.__init__(module)
    module.eps, module.fused, module.weight = EPS, kernels.fused, torch.nn.Parameter(gain)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(grad)
    assert error(y, to_bf16(expected.float())) < 2e-3
    for found, want in ((leaf.grad, wide.grad), (module.weight.grad, wide_gain.grad)):
        assert found is not None and want is not None
        assert error(found, want) < 0.01


def test_the_choice_of_kernels() -> None:
    assert isinstance(kernels_for("cpu"), ReferenceKernels)
    assert isinstance(kernels_for("cuda", "reference"), ReferenceKernels)
    assert isinstance(kernels_for("cuda"), TritonKernels)
    assert kernels_for("cuda").expander is None
    assert isinstance(kernels_for("cuda", keep_bf16_weights=True).expander, WeightExpander)
    assert (
        kernels_for("cpu", keep_bf16_weights=True).expander is None
    )  # multiplies by the codes, there is nothing to save
    with pytest.raises(ValueError, match=r"run.kernels=triton needs a GPU, this run is on cpu"):
        kernels_for("cpu", "triton")


def test_rows_and_blocks_beyond_the_one_pass_kernels_go_elsewhere(device: str) -> None:
    """The limits of `fused` are not those of a layer, which then computes step by step, activation functions in one."""
    kernels = TritonKernels()
    assert kernels.fused is not None and kernels.sharded is not None
    blocks = TOPK.model_copy(update={"pattern": "block", "block_size": 128})
    for layout, features, fits in [(TOPK, 16384, True), (TOPK, 18432, False), (blocks, 256, False)]:
        assert (fused_for(kernels, layout, torch.bfloat16, features, None) is not None) == fits
    config = SimpleNamespace(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    x, grad = draw(2, 2 * 18432, device=device), draw(2, 18432, device=device)
    found, expected = [], []
    for results, fused, leaf in ((found, kernels.fused, x.clone()), (expected, None, x.double())):
        hidden = activate(leaf.requires_grad_(), config, fused)
        results += [hidden, *torch.autograd.grad(hidden, leaf, grad.to(leaf.dtype))]
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs) < 1e-2


def test_a_weight_gradient_is_added_wherever_its_buffer_begins(device: str) -> None:
    grad, x_scale = draw(32, 64, device=device), torch.rand(32, 1, device=device)
    weight = torch.randint(-1, 2, (64, 32), dtype=torch.int8, device=device)
    x = torch.randint(-9, 10, (32, 32), dtype=torch.int8, device=device)
    found = []
    for start in (0, 2):  # elements of 4 bytes; kernels want multiples of 16 bytes
        main_grad = torch.ones(64 * 32 + 8, device=device)[start : start + 64 * 32].view(64, 32)
        backward = TritonKernels().backward(
            grad, weight, weight_scale=torch.ones(1, device=device), x_scale=x_scale, e4m3=True
        )
        assert backward.wgrad(x, x_scale, main_grad) is None
        found.append(main_grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-5)
    assert (found[0] != 1).any()
