"""Norm, codes and top-K of rows spread over ranks, against the reference on the whole row."""

import pytest
import torch
from torch import Tensor

from kernels import fused, reference, sharded, sharded_backward
from kernels.dispatch import Activation, Before
from kernels.fused import Sparsified
from tests.kernels.test_sparsify import expected, rows
from tests.testing import torchrun

EPS = 1e-5
ULP = 2**-7
"""bf16 results: half a unit on a GPU, a whole one in the interpreter, which cuts off."""


def split(x: Tensor, ranks: int, activation: Activation | None = None) -> list[Tensor]:
    """What each rank holds of rows, or of [gate | up]."""
    halves = x.chunk(1 if activation in (None, "relu2") else 2, dim=-1)
    return [torch.cat(parts, dim=-1) for parts in zip(*(half.chunk(ranks, dim=-1) for half in halves), strict=True)]


def by_shards(
    shards: list[Tensor], kept: int, activation: Activation | None = None, gain: Tensor | None = None
) -> Sparsified:
    """What the ranks do, one after the other; codes of the whole row."""
    gains = [None] * len(shards) if gain is None else list(gain.chunk(len(shards)))
    before = [Before(activation, part, EPS) for part in gains]
    sums = torch.stack([sharded.row_sums(*part) for part in zip(shards, before, strict=True)])
    parts = [sharded.count_codes(x, sums, front) for x, front in zip(shards, before, strict=True)]
    coarse = torch.stack([count for _, count in parts])
    fine = torch.stack([sharded.count_nearest(part.codes, coarse, kept) for part, _ in parts])
    codes = [sharded.keep_largest(part.codes, coarse, fine, kept, rank) for rank, (part, _) in enumerate(parts)]
    for part, _ in parts[1:]:  # all ranks find the same
        assert torch.equal(part.scale, parts[0][0].scale)
    return Sparsified(torch.cat(codes, dim=-1), parts[0][0].scale, parts[0][0].rstd)


def normalized(x: Tensor, gain: Tensor, ranks: int) -> Tensor:
    """The whole row, as its ranks normalize it."""
    parts = [(part, Before(gain=g, eps=EPS)) for part, g in zip(x.chunk(ranks, -1), gain.chunk(ranks), strict=True)]
    sums = torch.stack([sharded.row_sums(*part) for part in parts])
    return torch.cat([sharded.normalize(part, sums, before)[0] for part, before in parts], dim=-1)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in ("normal", "heavy", "zero", "constant", "integers", "negative zero")),
        *((kind, torch.float32) for kind in ("heavy", "integers")),
    ],
)
def test_the_largest_of_a_row_that_ranks_share(kind: str, dtype: torch.dtype, device: str) -> None:
    for tokens, features, ranks in ((2, 126, 2), (1, 24, 3), (1, 7, 1)):
        x = rows(kind, tokens, features, device, dtype)
        for kept in {1, features // 2}:
            found = by_shards(list(x.chunk(ranks, dim=-1)), kept)
            want_codes, want_scale = expected(x, kept, None)
            assert torch.equal(found.scale, want_scale)
            assert torch.equal(found.codes, want_codes)


@pytest.mark.parametrize("activation", [None, "relu2", "relu2_glu", "swiglu"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_activation_and_norm_in_front(activation: Activation | None, ranks: int, device: str) -> None:
    """Rows that are powers of two have the same mean square in any order, and so the codes of the unsharded kernel."""
    features, kept = 96, 40
    width = features if activation in (None, "relu2") else 2 * features
    x = torch.exp2(rows("normal", 5, width, device).float().round()).bfloat16()
    gain = torch.linspace(0.5, 1.5, features).bfloat16().to(device)
    want = fused.sparsify(x, kept, activation=activation, gain=gain, eps=EPS)
    found = by_shards(split(x, ranks, activation), kept, activation, gain)
    assert torch.equal(found.rstd, want.rstd) if activation is None else torch.allclose(found.rstd, want.rstd)
    if activation != "swiglu":  # whose values are no powers of two
        assert torch.equal(found.scale, want.scale)
        assert torch.equal(found.codes, want.codes)
    assert (found.codes.int() - want.codes.int()).abs().sum() <= 2 * 127


def test_the_largest_magnitude_is_that_of_the_normalized_row(device: str) -> None:
    """It is computed before the row is; no code may exceed 127."""
    x = rows("heavy", 64 if device == "cuda" else 6, 512, device)
    gain = (1 + 0.5 * torch.randn(512, generator=torch.Generator().manual_seed(3))).to(device)
    found = by_shards(split(x, 2), 512, None, gain)
    y = normalized(x, gain, 2)
    want_codes, want_scale = expected(y, None, None)
    assert torch.equal(found.scale, want_scale)
    assert torch.equal(found.codes, want_codes)
    assert (found.codes.int().abs().amax(-1) == 127).all()


@pytest.mark.parametrize(("kept", "block"), [(None, None), (30, None), (16, 32), (2, 4)])
def test_local_patterns_under_the_scale_of_the_whole_row(kept: int | None, block: int | None, device: str) -> None:
    x = rows("heavy", 3, 192, device)
    scale = reference.row_scale(x.abs().amax(-1, keepdim=True).float())
    sums = torch.stack([sharded.row_sums(shard, Before()) for shard in x.chunk(2, dim=-1)])
    for shard in x.chunk(2, dim=-1):
        want = reference.absmax_codes(shard, scale)
        if kept is not None:
            mask = reference.topk_mask(want, kept) if block is None else reference.block_mask(want, kept, block)
            want = reference.apply_mask(want, mask)
        codes, found_scale, _ = sharded.local_codes(shard, sums, kept, block, Before())
        assert torch.equal(found_scale, scale)
        assert torch.equal(codes, want)


def test_full_sizes(device: str) -> None:
    for features in (2720, 7168) if device == "cuda" else (1360,):
        x = rows("heavy", 32 if device == "cuda" else 2, 2 * features, device)
        found = by_shards(list(x.chunk(4, dim=-1)), features)
        want_codes, want_scale = expected(x, features, None)
        assert torch.equal(found.scale, want_scale)
        assert torch.equal(found.codes, want_codes)


def whole_row(x: Tensor, gain: Tensor, grad: Tensor, activation: Activation | None) -> tuple[Tensor, ...]:
    """Autograd through the whole row in float64."""
    x, gain = x.double().requires_grad_(), gain.double().requires_grad_()
    a = x
    if activation is not None:
        gate, up = (x, 1.0) if activation == "relu2" else x.chunk(2, dim=-1)
        a = (torch.nn.functional.silu(gate) if activation == "swiglu" else gate.relu().square()) * up
    y = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + EPS) * gain
    return y.detach(), *torch.autograd.grad(y, (x, gain), grad.double())


def gradients_by_shards(
    x: Tensor, gain: Tensor, grad: Tensor, rstd: Tensor, ranks: int, activation: Activation | None
) -> list[Tensor]:
    """What the ranks do, one after the other; dx and dgain of the whole row."""
    features = grad.shape[-1]
    before = [Before(activation, part, EPS) for part in gain.chunk(ranks)]
    parts = list(zip(grad.chunk(ranks, dim=-1), split(x, ranks, activation), before, strict=True))
    dots = torch.stack([sharded_backward.gradient_dots(*part, rstd) for part in parts]).sum(0)
    found = [sharded_backward.gradients(*part, rstd, dots, features) for part in parts]
    halves = [dx.chunk(x.shape[-1] // features, dim=-1) for dx, _ in found]
    dx = torch.cat([torch.cat(half, dim=-1) for half in zip(*halves, strict=True)], dim=-1)
    return [dx, torch.cat([dgain for _, dgain in found])]


@pytest.mark.parametrize("activation", [None, "relu2", "relu2_glu", "swiglu"])
@pytest.mark.parametrize(("tokens", "features", "ranks"), [(5, 126, 2), (3, 1000, 4), (9, 64, 1), (2, 21, 3)])
def test_values_and_gradients(
    tokens: int, features: int, ranks: int, activation: Activation | None, device: str
) -> None:
    generator = torch.Generator().manual_seed(features)
    width = features if activation in (None, "relu2") else 2 * features
    x = torch.randn(tokens, width, generator=generator).bfloat16().to(device)
    grad = torch.randn(tokens, features, generator=generator).bfloat16().to(device)
    gain_dtype = torch.bfloat16 if ranks % 2 else torch.float32
    gain = (1 + 0.3 * torch.randn(features, generator=generator)).to(gain_dtype).to(device)
    y, *want = whole_row(x, gain, grad, activation)
    rstd = by_shards(split(x, ranks, activation), features, activation, gain).rstd
    assert rstd is not None
    found = gradients_by_shards(x, gain, grad, rstd, ranks, activation)
    if activation is None:
        found.append(normalized(x, gain, ranks))
        want.append(y)
    for mine, theirs in zip(found, want, strict=True):
        assert ((mine.double() - theirs).abs() <= ULP * theirs.abs() + 4e-3 * theirs.abs().max()).all()


def test_what_the_kernels_refuse(device: str) -> None:
    x = rows("normal", 2, 64, device)
    sums = sharded.row_sums(x, Before())[None]
    found, coarse = sharded.count_codes(x, sums, Before())
    with pytest.raises(ValueError, match=r"sums has shape \(1, 1, 2\), the kernel takes \[ranks, 2, 2\]"):
        sharded.count_codes(x, sums[:, :1], Before())
    with pytest.raises(ValueError, match=r"coarse has shape \(1, 1, 16\), the kernel takes \[ranks, 2, 16\]"):
        sharded.count_nearest(found.codes, coarse[None, :1], 3)
    with pytest.raises(ValueError, match=r"fine has shape \(1, 2, 16\), the kernel takes \[ranks, 2, 8\]"):
        sharded.keep_largest(found.codes, coarse[None], coarse[None], 3, 0)
    with pytest.raises(ValueError, match="block=5"):
        sharded.local_codes(x, sums, 2, 5, Before())
    with pytest.raises(ValueError, match=r"x is torch\.float32, the kernel takes"):
        sharded.row_sums(x.float(), Before(gain=x[0]))
    with pytest.raises(ValueError, match=r"gain has shape \(7,\)"):
        sharded.normalize(x, sums, Before(gain=x[0, :7]))
    with pytest.raises(ValueError, match=r"grad has shape \(2, 60\), an x of \(2, 64\) takes \[..., 64\]"):
        sharded_backward.gradient_dots(x[:, :60], x, Before(gain=x[0]), sums[0, :, :1])
    with pytest.raises(ValueError, match="before has no gain"):
        sharded_backward.gradient_dots(x, x, Before("relu2"), sums[0, :, :1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_two_processes_give_the_codes_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the layer's own collectives."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torchrun("tests.kernels.sharded_ranks", nproc=2)
