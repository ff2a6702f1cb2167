"""Top-K of 16-bit floats against the reference."""

import pytest
import torch

from kernels import reference, topk_float
from tests.kernels.test_sparsify import rows


def assert_same(x: torch.Tensor, kept: int, block: int | None = None) -> None:
    mask = reference.topk_mask(x, kept) if block is None else reference.block_mask(x, kept, block)
    found = topk_float.largest(x, kept, block)
    assert torch.equal(found.view(torch.int16), torch.where(mask, x, 0).view(torch.int16))


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero", "constant", "subnormal", "integers", "negative zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_of_a_row(kind: str, dtype: torch.dtype, device: str) -> None:
    for tokens, features in ((3, 63), (2, 1000), (1, 1), (3, 17), (4, 256)):
        x = rows(kind, tokens, features, device, dtype)
        for kept in {1, features // 2 or 1, features}:
            assert_same(x, kept)


@pytest.mark.parametrize("kind", ["heavy", "constant", "integers"])
@pytest.mark.parametrize(("kept", "block"), [(2, 4), (16, 32), (3, 5), (1, 2), (30, 64)])
def test_n_of_every_m(kind: str, kept: int, block: int, device: str) -> None:
    for num_blocks in (1, 3, 33):
        assert_same(rows(kind, 3, num_blocks * block, device), kept, block)


def test_infinities_and_nans_come_first(device: str) -> None:
    x = torch.tensor([[1.0, float("inf"), -3.0, float("nan"), -float("inf"), 2.0]], device=device).bfloat16()
    for kept in range(1, 7):
        assert_same(x, kept)


def test_full_sizes_and_strides(device: str) -> None:
    for features in (2048, 5440, 14336) if device == "cuda" else (2048,):
        x = rows("heavy", 64 if device == "cuda" else 2, 2 * features, device)[:, :features]
        assert_same(x, features // 2)
        assert_same(x.reshape(2, -1, features), 16, 32)


def test_what_the_kernel_refuses(device: str) -> None:
    with pytest.raises(ValueError, match="float32, the kernel takes"):
        topk_float.largest(torch.zeros(1, 8, device=device), 4)
    with pytest.raises(ValueError, match="kept=9 must be 1 to 8"):
        topk_float.largest(torch.zeros(1, 8, device=device).bfloat16(), 9)
