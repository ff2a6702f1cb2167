"""Ternary codes of a list of weights against the reference, bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels import reference, ternarize
from kernels.dispatch import Expanded
from kernels.triton_kernels import WeightExpander

SHAPES = [(6, 40), (3, 100), (8, 16), (1, 1)]


def weights(dtype: torch.dtype, device: str, shapes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=generator) * 0.02 * 3**i).to(dtype).to(device) for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_sums_of_a_list(dtype: torch.dtype, device: str) -> None:
    shapes = SHAPES + ([(4096, 1024), (1000, 14336)] if device == "cuda" else [])
    matrices = weights(dtype, device, shapes)
    parts = [torch.arange(rows) * 3 // rows for rows, _ in shapes]  # up to three parts
    table = ternarize.row_table(matrices, parts)
    sums = ternarize.part_sums(table, dtype)
    expected = [
        reference.absmean_sum(matrix[(part == p).to(device)])
        for matrix, part in zip(matrices, parts, strict=True)
        for p in range(int(part.max()) + 1)
    ]
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-14, atol=0)
    scale = reference.absmean_scale(sums, table.part_size)
    flat = ternarize.codes(table, scale, dtype)
    row_scales = scale[table.part.long()].split([rows for rows, _ in shapes])
    for matrix, codes, row_scale in zip(matrices, flat.split([m.numel() for m in matrices]), row_scales, strict=True):
        assert torch.equal(codes.view_as(matrix), reference.ternary_codes(matrix, row_scale[:, None]))


def test_codes_in_bf16_are_what_the_expander_makes_of_the_codes(device: str) -> None:
    """In place, twice: of one part the codes themselves, of several times the ratios of their scales."""
    shapes = [(6, 40), (3, 100), (8, 16)]
    num_parts = (3, 1, 2)
    matrices = weights(torch.bfloat16, device, shapes)
    parts = [torch.arange(rows) * count // rows for (rows, _), count in zip(shapes, num_parts, strict=True)]
    table = ternarize.row_table(matrices, parts)
    size = table.num_codes
    expanded = Expanded(
        torch.full((size,), torch.nan, dtype=torch.bfloat16, device=device),
        torch.full((3, 4), 9.0, device=device)[:, 0],
    )
    for factor in (4.0, 0.5):
        matrices[0][:2] *= factor
        scale = reference.absmean_scale(ternarize.part_sums(table, torch.bfloat16), table.part_size)
        codes = ternarize.codes(table, scale, torch.bfloat16, expanded=expanded)
        assert torch.equal(codes, ternarize.codes(table, scale, torch.bfloat16))
        row_scales = scale[table.part.long()].split([rows for rows, _ in shapes])
        sizes = [matrix.numel() for matrix in matrices]
        pieces = zip(shapes, codes.split(sizes), row_scales, expanded.values.split(sizes), strict=True)
        for number, (shape, found, row_scale, in_bf16) in enumerate(pieces):
            of_rows = row_scale if num_parts[number] > 1 else row_scale[:1]
            expected = WeightExpander().expand(found.view(shape), of_rows.contiguous())
            assert torch.equal(in_bf16.view(shape), expected.values)
            assert expanded.scale[number] == expected.scale == row_scale.max()
            if num_parts[number] == 1:
                assert torch.equal(in_bf16, found.bfloat16())


def test_outputs_of_another_size_are_refused(device: str) -> None:
    table = ternarize.row_table(weights(torch.float32, device, [(2, 8)]), [torch.zeros(2, dtype=torch.int64)])
    scale, values = torch.ones(1, device=device), torch.empty(16, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"out has 16 elements of torch.bfloat16, the weights take 16 of torch.int8"):
        ternarize.codes(table, scale, torch.float32, values)
    with pytest.raises(ValueError, match=r"expanded.values has 15 elements of torch.bfloat16, the weights take 16 of"):
        ternarize.codes(table, scale, torch.float32, expanded=Expanded(values[1:], scale))
    with pytest.raises(ValueError, match=r"expanded.scale has 2 elements of torch.float32, the weights take 1 of"):
        ternarize.codes(table, scale, torch.float32, expanded=Expanded(values, scale.expand(2)))


def test_halves_go_to_zero_and_zeros_stay(device: str) -> None:
    matrix = torch.tensor([[0.5, -0.5, 0.5000001, -0.75, 0.0, 3.0]], device=device)
    table = ternarize.row_table([matrix], [torch.zeros(1, dtype=torch.int64)])
    codes = ternarize.codes(table, torch.ones(1, device=device), torch.float32)
    assert codes.tolist() == [0, 0, 1, -1, 0, 1]
    zeros = torch.zeros(2, 8, device=device)
    table = ternarize.row_table([zeros], [torch.zeros(2, dtype=torch.int64)])
    scale = reference.absmean_scale(ternarize.part_sums(table, torch.float32), table.part_size)
    assert scale.item() == pytest.approx(1e-5)
    assert ternarize.codes(table, scale, torch.float32).count_nonzero() == 0


def test_bad_input_is_refused_before_the_launch(device: str) -> None:
    part = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="no weights"):
        ternarize.row_table([], [])
    with pytest.raises(ValueError, match=r"weights\[0\] is torch.int8, the kernel takes torch.float32 or"):
        ternarize.row_table([torch.zeros(4, 4, dtype=torch.int8, device=device)], [part])
    with pytest.raises(ValueError, match=r"weights\[1\] is torch.bfloat16, the kernel takes torch.float32"):
        matrix = torch.zeros(4, 4, device=device)
        ternarize.row_table([matrix, matrix.bfloat16()], [part, part])
    with pytest.raises(ValueError, match=r"weights\[0\] of shape \(4, 4\) is not a contiguous matrix"):
        ternarize.row_table([torch.zeros(4, 8, device=device)[:, ::2]], [part])
    with pytest.raises(ValueError, match=r"parts\[0\] names 4 rows, weights\[0\] has 5"):
        ternarize.row_table([torch.zeros(5, 4, device=device)], [part])
