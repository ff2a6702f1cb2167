"""A layer's product for few tokens: the bits of the reference on either kernel, and which inputs it takes."""

import pytest
import torch

from kernels import reference
from kernels.decode import MAX_TOKENS
from kernels.decode_linear import GEMV_TOKENS, TwoBitPacker, TwoBitWeight


@pytest.mark.parametrize("several_scales", [False, True])
@pytest.mark.parametrize("num_tokens", [1, GEMV_TOKENS, GEMV_TOKENS + 1, MAX_TOKENS])
def test_products_are_bit_equal_to_the_reference(num_tokens: int, several_scales: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    codes_OD = torch.randint(-1, 2, (80, 63), generator=generator, dtype=torch.int8).to(device)
    scale = (torch.rand(80 if several_scales else 1, generator=generator) + 0.5).to(device)
    weight = TwoBitWeight(codes_OD, scale, num_tokens)
    for rows in {1, num_tokens}:
        x = torch.randint(-128, 128, (1, rows, 63), generator=generator, dtype=torch.int8).to(device)
        x_scale = torch.rand(1, rows, 1, generator=generator).to(device)
        expected = reference.linear(x, codes_OD, x_scale_T1=x_scale, weight_scale_O=scale, dtype=torch.bfloat16)
        for _ in range(2):  # the second launch finds its workspace as the first did
            assert weight.takes(x)
            assert torch.equal(weight.linear(x, x_scale), expected)


def test_what_it_does_not_take(device: str) -> None:
    codes_OD = torch.ones(16, 16, dtype=torch.int8, device=device)
    scale = torch.ones(1, device=device)
    few, many = TwoBitWeight(codes_OD, scale, 1), TwoBitWeight(codes_OD, scale, GEMV_TOKENS + 1)
    x = torch.ones(MAX_TOKENS + 1, 16, dtype=torch.int8, device=device)
    assert [weight.takes(x[:rows]) for weight in (few, many) for rows in (0, GEMV_TOKENS, GEMV_TOKENS + 1)] == [
        *(False, True, False),
        *(False, True, True),
    ]
    assert not many.takes(x)
    assert not few.takes(x[:1].bfloat16())
    assert [TwoBitPacker().takes(codes_OD.to(dtype)) for dtype in (torch.bfloat16, torch.float32)] == [True, False]
