"""Gradients out of one matrix of several experts, against slices of it."""

import pytest
import torch

from kernels.gradient_table import GradientTable
from kernels.stacked_gradients import add_below_each_other, add_side_by_side


def table(num_experts: int, rows: int, columns: int, device: str) -> GradientTable:
    generator = torch.Generator().manual_seed(rows)
    return GradientTable.of(list(torch.randn(num_experts, rows, columns, generator=generator).to(device)))


def stacked(rows: int, columns: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(rows, columns, generator=generator).bfloat16().to(device)


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("rows", [(12, 12), (12, 16), (1, 5)])  # of a part, and with what is left out
def test_below_each_other(num_parts: int, rows: tuple[int, int], device: str) -> None:
    used, height = rows
    for columns in (24, 516):
        buffers = table(3, num_parts * used, columns, device)
        dw = stacked(3 * num_parts * height, columns, device)
        dw.view(3, num_parts, height, columns)[:, :, used:] = torch.nan
        parts = dw.view(3, num_parts, height, columns)[:, :, :used].flatten(1, 2).float()
        want = [buffer + part for buffer, part in zip(buffers.buffers, parts, strict=True)]
        add_below_each_other(dw, buffers, num_parts=num_parts)
        assert all(map(torch.equal, buffers.buffers, want))


@pytest.mark.parametrize("columns", [(128, 128), (100, 128), (516, 640)])
def test_side_by_side(columns: tuple[int, int], device: str) -> None:
    used, width = columns
    buffers, dw = table(3, 20, used, device), stacked(20, 3 * width, device)
    parts = dw.view(20, 3, width)[:, :, :used].transpose(0, 1).float()
    want = [buffer + part for buffer, part in zip(buffers.buffers, parts, strict=True)]
    add_side_by_side(dw, buffers)
    assert all(map(torch.equal, buffers.buffers, want))


def test_what_does_not_fit_is_refused(device: str) -> None:
    buffers = table(3, 8, 16, device)
    with pytest.raises(ValueError, match=r"stacked: shape \[24, 8\], expected \[any, 16\]"):
        add_below_each_other(stacked(24, 8, device), buffers, num_parts=1)
    with pytest.raises(ValueError, match="stacked has 21 rows: 3 gradients of 8 do not fit into it"):
        add_below_each_other(stacked(21, 16, device), buffers, num_parts=1)
    with pytest.raises(ValueError, match="stacked has 24 columns: 3 of 16 do not fit into it"):
        add_side_by_side(stacked(8, 24, device), buffers)
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        add_side_by_side(stacked(8, 48, device).float(), buffers)
