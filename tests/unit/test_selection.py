"""Exact top-K: K kept, ties to the lowest index, for codes and floats of every type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from qsparse_layers.config import kept_count
from qsparse_layers.selection import topk_mask


def by_sorting(values: torch.Tensor, k: int) -> list[list[bool]]:
    rows = []
    for row in values.double().abs().tolist():
        kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        rows.append([i in kept for i in range(len(row))])
    return rows


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mask_is_the_k_first_of_a_stable_sort(dtype: torch.dtype, data: st.DataObject) -> None:
    features = data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, features))
    seed = data.draw(st.integers(0, 2**31))
    spread = data.draw(st.sampled_from([1, 3, 128]))  # a small spread makes ties
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-spread, spread, (3, features), generator=generator)
    values = values.to(dtype) if dtype == torch.int8 else (values * 0.37).to(dtype)
    expected = by_sorting(values, k)
    assert topk_mask(values, k).tolist() == expected
    assert reference.topk_mask(values, k).tolist() == expected


def test_ties_go_to_the_lowest_index_and_exactly_k_stay() -> None:
    values = torch.tensor([[5, -5, 5, 1, -5, 0]], dtype=torch.int8)
    assert topk_mask(values, 3).tolist() == [[True, True, True, False, False, False]]
    assert topk_mask(values, 4).tolist() == [[True, True, True, False, True, False]]


def test_extreme_codes_and_floats_are_ordered_by_magnitude() -> None:
    assert topk_mask(torch.tensor([[127, -128, 126]], dtype=torch.int8), 1).tolist() == [[False, True, False]]
    tiny, huge = 5e-324, 1e308
    values = torch.tensor([[0.0, -0.0, tiny, -huge, float("inf")]], dtype=torch.float64)
    assert topk_mask(values, 3).tolist() == [[False, False, True, True, True]]


def test_block_mask_keeps_n_of_every_m() -> None:
    values = torch.tensor([[1.0, 9.0, 8.0, 2.0, 0.1, 0.2, 0.4, 0.3]])
    assert reference.block_mask(values, 2, 4).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("features", "sparsity", "kept"), [(10, 0.9, 1), (10, 0.6, 4), (704, 0.4, 422), (5, 0.99, 1), (3, 0.333333333, 2)]
)
def test_kept_count_is_decimal_exact(features: int, sparsity: float, kept: int) -> None:
    assert kept_count(features, sparsity) == kept
