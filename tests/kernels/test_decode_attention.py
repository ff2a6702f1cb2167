"""Attention of one token against float64, at every kind of position, with memories and views as layers have them."""

import math

import pytest
import torch
from torch import Tensor

from kernels.decode_attention import BLOCK, attend

SHAPES = [(1, 4, 4, 16, 70), (2, 6, 2, 24, 200), (3, 16, 1, 64, 1)]
"""Texts, heads, groups, features, positions."""
GPU_SHAPES = [*SHAPES, (1, 32, 32, 64, 2048), (16, 32, 8, 128, 2048), (2, 64, 1, 256, 5000)]


class Case:
    def __init__(self, shape: tuple[int, int, int, int, int], device: str, spread: float = 1.0) -> None:
        texts, heads, groups, features, self.positions = shape
        generator = torch.Generator(device).manual_seed(sum(shape))

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).bfloat16()

        mixed = draw(texts, groups, heads // groups + 2, features)  # as the q/k/v projection returns it
        self.query = mixed[:, :, :-2].flatten(1, 2) * spread
        self.key, self.value = mixed[:, :, -2] * spread, mixed[:, :, -1]
        self.memory = draw(2, texts, groups, self.positions, features)
        self.arrivals = torch.zeros(texts * groups, dtype=torch.int32, device=device)

    def found(self, position: int, splits: int | None = None) -> Tensor:
        keys, values = self.memory.clone()
        keys[:, :, position:], values[:, :, position:] = math.nan, math.nan  # nothing behind the past is looked at
        at = torch.tensor([position], device=keys.device)
        memory = {"keys": keys, "values": values, "position": at, "arrivals": self.arrivals}
        y = attend(self.query, self.key, self.value, **memory, splits=splits)
        assert torch.equal(keys[:, :, position], self.key)
        assert torch.equal(values[:, :, position], self.value)
        assert torch.equal(keys[:, :, :position], self.memory[0, :, :, :position])
        assert torch.isnan(keys[:, :, position + 1 :]).all()
        assert not self.arrivals.any()
        return y

    def expected(self, position: int) -> Tensor:
        keys, values = (
            torch.cat([past[:, :, :position], new[:, :, None]], dim=2).double()
            for past, new in zip(self.memory, (self.key, self.value), strict=True)
        )
        q = self.query.double().unflatten(1, (keys.shape[1], -1))
        weights = torch.softmax(q @ keys.mT / math.sqrt(q.shape[-1]), dim=-1)
        return (weights @ values).flatten(1, 2)


def of_device(device: str) -> list[tuple[int, int, int, int, int]]:
    return SHAPES if device == "cpu" else GPU_SHAPES


@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_it_is_softmax_attention(spread: float, splits: int | None, device: str) -> None:
    for shape in of_device(device):
        case = Case(shape, device, spread)
        last = case.positions - 1
        for position in sorted({0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 1, last} & set(range(case.positions))):
            found, expected = case.found(position, splits), case.expected(position)
            assert found.dtype == torch.bfloat16
            assert (found.double() - expected).abs().max() < 0.02 * expected.abs().max(), (shape, position)


def test_equal_inputs_give_equal_bits(device: str) -> None:
    case = Case(of_device(device)[-2], device)
    first = case.found(case.positions - 1)
    for _ in range(3):
        assert torch.equal(case.found(case.positions - 1), first)


def test_bad_arguments_are_named(device: str) -> None:
    case = Case(SHAPES[0], device)
    keys, values = case.memory
    good = {
        **{"query": case.query, "key": case.key, "value": case.value, "keys": keys, "values": values},
        "position": torch.zeros(1, dtype=torch.int64, device=device),
        "arrivals": case.arrivals,
    }
    for name, bad, message in [
        ("query", case.query[:, :3], r"query: shape \[1, 3, 16\], expected a multiple of 4 heads in the middle"),
        ("query", case.query.float(), "query is torch.float32, the kernel takes torch.bfloat16"),
        ("key", case.key[:, :, :8], r"key: shape \[1, 4, 8\], strides .*; expected \[1, 4, 16\] with contiguous"),
        ("values", values[:, :, :5], r"values: shape \[1, 4, 5, 16\], expected \[1, 4, 70, 16\]"),
        ("keys", torch.zeros(1, 4, 70, 512, dtype=torch.bfloat16, device=device), "values: shape"),
        ("position", torch.zeros(1, device=device), "position: dtype torch.float32, expected torch.int64"),
        ("arrivals", case.arrivals[:2], "arrivals has 2 entries, expected at least 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(**{**good, name: bad})
