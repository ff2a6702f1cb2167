"""Activation and RMSNorm fused with sparsify + quantize: codes against the chain of torch operations, gradients against
float64 autograd of the same chain without roundings."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import fused, fused_backward, reference
from kernels.dispatch import Activation

SIZES = [(2, 63), (2, 100), (1, 1000), (2, 256), (1, 1), (1, 2048)]
LONG = [(64, 4096), (33, 11008), (300, 14336), (3, 16384)]
KINDS = ["normal", "heavy", "zero", "constant"]
Round = Callable[[Tensor], Tensor]


def sizes(device: str) -> list[tuple[int, int]]:
    return SIZES + (LONG if device == "cuda" else [])


def rows(kind: str, tokens: int, features: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + tokens * 1000 + features)
    x = torch.randn(tokens, features, generator=generator)
    if kind == "heavy":
        x = x * torch.exp(2 * torch.randn(tokens, features, generator=generator))
    elif kind == "zero":
        x = x * 0
    elif kind == "constant":
        x = torch.full_like(x, 0.37)
    return x.bfloat16().to(device)


def gain_of(features: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(features)
    return (1 + 0.3 * torch.randn(features, generator=generator)).to(dtype).to(device)


def halves(activation: Activation | None) -> int:
    return 1 if activation in (None, "relu2") else 2


def activated(x: Tensor, activation: Activation | None, rounding: Round) -> Tensor:
    """The activation in x's type (float32 or float64), rounded where torch's bf16 operations round."""
    if activation is None:
        return x
    gate, up = (x, None) if activation == "relu2" else x.chunk(2, -1)
    value = torch.nn.functional.silu(gate) if activation == "swiglu" else torch.relu(gate).square()
    value = rounding(value)
    return value if up is None else rounding(value * up)


def layer_input(
    x: Tensor, activation: Activation | None, gain: Tensor | None, eps: float, to_bf16: Round
) -> tuple[Tensor, Tensor | None]:
    """bf16 input of the quantizer and 1/rms, with the rounding that this device's casts do."""
    a = activated(x.float(), activation, lambda v: to_bf16(v).float())
    if gain is None:
        return a.bfloat16(), None
    rstd = torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)
    return to_bf16(a * rstd * gain), rstd


def sparse_codes(x: Tensor, kept: int | None, block: int | None) -> tuple[Tensor, Tensor]:
    scale = reference.row_scale(x.abs().amax(-1, keepdim=True))
    codes = reference.absmax_codes(x, scale)
    if kept is not None:
        mask = reference.topk_mask(codes, kept) if block is None else reference.block_mask(codes, kept, block)
        codes = reference.apply_mask(codes, mask)
    return codes, scale


@pytest.mark.parametrize("kind", [*KINDS, "infinite"])
@pytest.mark.parametrize("activation", ["relu2", "relu2_glu"])
def test_squared_relu_is_the_chain_bit_for_bit(kind: str, activation: Activation, device: str, to_bf16: Round) -> None:
    for tokens, features in sizes(device):
        x = rows(kind, tokens, features * halves(activation), device)
        if kind == "infinite":
            x[0, 0] = torch.inf
        want, _ = layer_input(x, activation, None, 0.0, to_bf16)
        for kept in {None, features // 2 or 1}:
            got = fused.sparsify(x, kept, activation=activation)
            codes, scale = sparse_codes(want, kept, None)
            torch.testing.assert_close(got.scale, scale, rtol=0, atol=0, equal_nan=True)
            finite = scale.isfinite().flatten()
            assert torch.equal(got.codes[finite], codes[finite])
            assert got.rstd is None


def test_the_reference_chain_is_torchs_in_bf16(device: str) -> None:
    x = rows("heavy", 64, 512, device)
    gate, up = x.chunk(2, -1)
    want = activated(x.float(), "relu2_glu", lambda v: v.bfloat16().float())
    assert torch.equal(torch.relu(gate).pow(2) * up, want.bfloat16())
    silu = activated(x.float(), "swiglu", lambda v: v.bfloat16().float())
    torch.testing.assert_close(torch.nn.functional.silu(gate) * up, silu.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [None, "relu2", "relu2_glu", "swiglu"])
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
def test_norm_differs_from_the_chain_by_single_roundings(
    kind: str, activation: Activation | None, gain_dtype: torch.dtype, device: str, to_bf16: Round
) -> None:
    for tokens, features in sizes(device):
        x = rows(kind, tokens, features * halves(activation), device)
        gain = gain_of(features, device, gain_dtype)
        got = fused.sparsify(x, None, activation=activation, gain=gain, eps=1e-6)
        want, rstd = layer_input(x, activation, gain, 1e-6, to_bf16)
        assert got.rstd is not None and rstd is not None
        loose = 2**-8 if activation == "swiglu" else 2**-18  # exp of another library, then two bf16 roundings
        torch.testing.assert_close(got.rstd, rstd, rtol=loose, atol=0)
        codes, scale = sparse_codes(want, None, None)
        torch.testing.assert_close(got.scale, scale, rtol=2**-7, atol=0)  # one bf16 step of the largest element
        moved = (got.codes.int() - codes.int()).abs()
        same = moved[(got.scale == scale).flatten()]
        assert moved.max() <= 2  # half a code for x and one for the scale
        assert same.numel() == 0 or same.max() <= 1
        assert same.count_nonzero() <= 1e-3 * same.numel() + 1


@pytest.mark.parametrize("activation", [None, "relu2_glu"])
def test_selection_is_that_of_the_unsparse_codes(activation: Activation | None, device: str) -> None:
    gain = gain_of(640, device)
    x = rows("heavy", 3, 640 * halves(activation), device)
    dense = fused.sparsify(x, None, activation=activation, gain=gain)
    for kept, block in ((200, None), (640, None), (2, 4), (16, 32), (3, 5)):
        mask = (
            reference.topk_mask(dense.codes, kept) if block is None else reference.block_mask(dense.codes, kept, block)
        )
        got = fused.sparsify(x, kept, block, activation=activation, gain=gain)
        assert torch.equal(got.codes, reference.apply_mask(dense.codes, mask))
        assert torch.equal(got.scale, dense.scale)


def test_swiglu_within_two_roundings(device: str, to_bf16: Round) -> None:
    x = rows("heavy", 4, 2 * 1000, device)
    want, _ = layer_input(x, "swiglu", None, 0.0, to_bf16)
    got = fused.sparsify(x, None, activation="swiglu")
    value = got.codes.float() * got.scale
    bound = want.float().abs() * 2**-6 + got.scale * 0.51
    assert ((value - want.float()).abs() <= bound).all()


def reference_gradients(
    grad: Tensor, x: Tensor, activation: Activation | None, gain: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """float64 autograd through the chain without roundings."""
    wide = x.double().requires_grad_()
    wide_gain = None if gain is None else gain.double().requires_grad_()
    out = activated(wide, activation, lambda v: v)
    if wide_gain is not None:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * wide_gain
    out.backward(grad.double())
    assert wide.grad is not None
    return wide.grad, None if wide_gain is None else wide_gain.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "norm"),
    [(None, True), ("relu2", False), ("relu2", True), ("relu2_glu", False), ("relu2_glu", True), ("swiglu", True)],
)
def test_gradients(kind: str, activation: Activation | None, norm: bool, device: str) -> None:
    for tokens, features in sizes(device):
        x = rows(kind, tokens, features * halves(activation), device)
        grad = rows("normal", tokens, features, device, seed=7)
        gain = gain_of(features, device) if norm else None
        rstd = fused.sparsify(x, None, activation=activation, gain=gain).rstd
        dx, dgain = fused_backward.backward(grad, x, activation=activation, gain=gain, rstd=rstd)
        want, want_gain = reference_gradients(grad, x, activation, gain, 1e-5)
        bound = 2**-7 * want.abs() + 1e-30  # the one rounding; half of that if to nearest; exp overflows
        if gain is not None and rstd is not None:
            bound += _cancellation(grad, x, activation, gain, rstd)
        assert ((dx.double() - want).abs() <= bound).all()
        if want_gain is not None:
            assert dgain is not None
            error = (dgain.double() - want_gain).abs().max()
            assert error <= (1e-5 if activation is None else 2**-5) * want_gain.abs().max()
        else:
            assert dgain is None


def _cancellation(grad: Tensor, x: Tensor, activation: Activation | None, gain: Tensor, rstd: Tensor) -> Tensor:
    """Error of da relative to the largest of its two terms, carried through the activation.

    float32 leaves 1e-5 of it.  After an activation a itself is rounded to bf16, up to twice, which the reference does
    not do, and enters the second term three times.
    """
    relative = 1e-5 if activation is None else 2**-5
    largest = (rstd * (grad.float() * gain).abs().amax(-1, keepdim=True)).expand(grad.shape)
    through = largest if activation is None else reference_gradients(largest, x, activation, None, 0.0)[0]
    return relative * through.double().abs()


def test_gain_gradient_sums_over_programs_and_is_deterministic(device: str) -> None:
    tokens = 3000 if device == "cuda" else 9
    x, grad = rows("normal", tokens, 96, device), rows("normal", tokens, 96, device, seed=1)
    gain = gain_of(96, device, torch.bfloat16)
    rstd = fused.sparsify(x, None, gain=gain).rstd
    launch = fused_backward.NormLaunch(num_warps=1, programs=2, registers=None)  # several rows per program
    dx, dgain = fused_backward.backward(grad, x, gain=gain, rstd=rstd, launch=launch)
    again = fused_backward.backward(grad, x, gain=gain, rstd=rstd, launch=launch)
    assert dgain is not None and again[1] is not None
    assert dgain.dtype == torch.bfloat16
    assert torch.equal(dx, again[0]) and torch.equal(dgain, again[1])
    _, want = reference_gradients(grad, x, None, gain, 1e-5)
    assert want is not None
    torch.testing.assert_close(dgain.double(), want, rtol=2**-7, atol=1e-5 * tokens**0.5)


def test_rows_may_be_strided_batched_and_absent(device: str) -> None:
    gain = gain_of(100, device)
    wide, grad = rows("normal", 6, 400, device), rows("normal", 6, 300, device, seed=1)
    x, g = wide[::2, 40:240], grad[::2, 10:110]
    whole = fused.sparsify(x.contiguous(), 30, activation="relu2_glu", gain=gain)
    part = fused.sparsify(x, 30, activation="relu2_glu", gain=gain)
    assert torch.equal(part.codes, whole.codes)
    batched = x.contiguous().view(3, 1, 200)
    assert torch.equal(fused.sparsify(batched, 30, activation="relu2_glu", gain=gain).codes[:, 0], whole.codes)
    dx, dgain = fused_backward.backward(g, x, activation="relu2_glu", gain=gain, rstd=part.rstd)
    want, want_gain = fused_backward.backward(
        g.contiguous(), x.contiguous(), activation="relu2_glu", gain=gain, rstd=whole.rstd
    )
    assert dgain is not None and want_gain is not None
    assert torch.equal(dx, want) and torch.equal(dgain, want_gain)
    empty = fused.sparsify(x[:0], 30, activation="relu2_glu", gain=gain)
    assert empty.codes.shape == (0, 100) and empty.scale.shape == (0, 1)
    dx, dgain = fused_backward.backward(g[:0], x[:0], activation="relu2_glu", gain=gain, rstd=empty.rstd)
    assert dgain is not None
    assert dx.shape == (0, 200) and torch.equal(dgain, torch.zeros(100, device=device))


def test_bad_input_is_refused_before_the_launch(device: str) -> None:
    x, gain = rows("normal", 4, 96, device), gain_of(96, device)
    rstd = torch.ones(4, 1, device=device)
    with pytest.raises(ValueError, match=r"neither activation nor gain: that is sparsify.sparsify"):
        fused.sparsify(x, 4)
    with pytest.raises(ValueError, match="activation='gelu' must be one of relu2, relu2_glu, swiglu"):
        fused.sparsify(x, 4, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x is torch.float32, the kernel takes torch.bfloat16"):
        fused.sparsify(x.float(), 4, gain=gain)
    with pytest.raises(ValueError, match="x has 95 columns, relu2_glu takes an even number"):
        fused.sparsify(x[:, :95], 4, activation="relu2_glu")
    with pytest.raises(ValueError, match=r"gain has shape \(96,\) .* takes 48 contiguous features"):
        fused.sparsify(x, 4, activation="swiglu", gain=gain)
    with pytest.raises(ValueError, match=r"gain is torch.float64, the kernel takes torch.bfloat16 or torch.float32"):
        fused.sparsify(x, 4, gain=gain.double())
    with pytest.raises(ValueError, match="kept=49 must be 1 to 48"):
        fused.sparsify(x, 49, activation="relu2_glu")
    with pytest.raises(ValueError, match="neither activation nor gain: the gradient of x is grad itself"):
        fused_backward.backward(x, x)
    with pytest.raises(ValueError, match="rstd is None: a norm takes its gain and the rstd"):
        fused_backward.backward(x, x, gain=gain)
    with pytest.raises(ValueError, match=r"grad has shape \(4, 96\), an x of \(4, 96\) takes \[..., 48\]"):
        fused_backward.backward(x, x, activation="swiglu")
    with pytest.raises(ValueError, match=r"rstd has shape \(4,\) .* the kernel takes \(4, 1\)"):
        fused_backward.backward(x, x, gain=gain, rstd=rstd[:, 0])
