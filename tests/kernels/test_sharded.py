"""Codes and top-K of rows spread over ranks, against the reference on the whole row, bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels import reference, sharded
from tests.kernels.test_sparsify import expected, rows
from tests.testing import torchrun


def by_shards(shards: list[Tensor], kept: int) -> tuple[Tensor, Tensor]:
    """What the ranks do, one after the other; codes of the whole row, scale of the last rank."""
    gamma = torch.stack([sharded.row_absmax(x) for x in shards]).amax(0)
    parts = [sharded.count_codes(x, gamma) for x in shards]
    counts = torch.stack([part[2] for part in parts])
    codes = [sharded.keep_largest(part[0], counts, kept, rank) for rank, part in enumerate(parts)]
    return torch.cat(codes, dim=-1), parts[-1][1]


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero", "constant", "integers", "negative zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_of_a_row_that_ranks_share(kind: str, dtype: torch.dtype, device: str) -> None:
    for tokens, features, ranks in ((3, 126, 2), (2, 1000, 4), (2, 24, 3), (1, 7, 1)):
        x = rows(kind, tokens, features, device, dtype)
        for kept in {1, features // 2, features}:
            codes, scale = by_shards(list(x.chunk(ranks, dim=-1)), kept)
            want_codes, want_scale = expected(x, kept, None)
            assert torch.equal(scale, want_scale)
            assert torch.equal(codes, want_codes)


@pytest.mark.parametrize(("kept", "block"), [(None, None), (30, None), (16, 32), (2, 4)])
def test_local_patterns_under_the_scale_of_the_whole_row(kept: int | None, block: int | None, device: str) -> None:
    x = rows("heavy", 3, 192, device)
    gamma = x.abs().amax(-1, keepdim=True).float()
    scale = reference.row_scale(gamma)
    for shard in x.chunk(2, dim=-1):
        want = reference.absmax_codes(shard, scale)
        if kept is not None:
            mask = reference.topk_mask(want, kept) if block is None else reference.block_mask(want, kept, block)
            want = reference.apply_mask(want, mask)
        codes, found_scale = sharded.local_codes(shard, gamma, kept, block)
        assert torch.equal(found_scale, scale)
        assert torch.equal(codes, want)


def test_full_sizes(device: str) -> None:
    for features in (2720, 7168) if device == "cuda" else (2720,):
        x = rows("heavy", 32 if device == "cuda" else 2, 2 * features, device)
        codes, scale = by_shards(list(x.chunk(2, dim=-1)), features)
        want_codes, want_scale = expected(x, features, None)
        assert torch.equal(scale, want_scale)
        assert torch.equal(codes, want_codes)


def test_what_the_kernels_refuse(device: str) -> None:
    x = rows("normal", 2, 64, device)
    gamma = sharded.row_absmax(x)
    codes, _, counts = sharded.count_codes(x, gamma)
    with pytest.raises(ValueError, match=r"gamma has shape \(1, 1\)"):
        sharded.count_codes(x, gamma[:1])
    with pytest.raises(ValueError, match=r"counts has shape \(1, 1, 128\), the kernel takes \[ranks, 2, 128\]"):
        sharded.keep_largest(codes, counts[None, :1], 3, 0)
    with pytest.raises(ValueError, match="block=5"):
        sharded.local_codes(x, gamma, 2, 5)


def test_two_processes_give_the_codes_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the layer's own collectives, on CPUs wherever this runs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torchrun("tests.kernels.sharded_ranks", nproc=2)
