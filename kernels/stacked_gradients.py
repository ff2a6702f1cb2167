"""Weight gradients of several experts out of one matrix, added to each expert's float32 buffer in one launch.

Block-sparse products write dW of all experts as one matrix, below each other or side by side, and each expert's part of
it may be filled up to whole tiles.  Adding the parts with tensor operations takes a launch per expert and reads strided
16-bit numbers one by one; here every element is read once, 2 bytes, and its sum read and written, 8 bytes.

Shapes: E experts, P parts of a weight (gate and up: 2), O rows and D columns of an expert's gradient.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gradient_table import GradientTable
from kernels.launch import cdiv
from kernels.tile_launch import check_same_device, check_tensor

_ROWS, _COLUMNS = 8, 512


@triton.jit
def _add_kernel(
    stacked_ptr, addresses_ptr, rows, columns, part_rows, expert_stride, part_stride, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of one expert's gradient; strides are those of `stacked`."""
    expert = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    line = (row // part_rows).to(tl.int64) * part_stride + (row % part_rows).to(tl.int64) * row_stride
    source = stacked_ptr + expert.to(tl.int64) * expert_stride + line[:, None] + column[None, :]
    buffer = tl.multiple_of(tl.load(addresses_ptr + expert).to(tl.pointer_type(tl.float32)), 16)
    target = buffer + row.to(tl.int64)[:, None] * columns + column[None, :]
    dw = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, tl.load(target, mask=inside, other=0.0) + dw, mask=inside)


def add_below_each_other(stacked: Tensor, main_grads: GradientTable, *, num_parts: int) -> None:
    """Add gradients [O, D] that lie below each other.

    Args:
        stacked: bf16 [E P W, D]: of each expert and part O / P rows, and W - O / P that are left out.
        main_grads: float32 [O, D] of each expert.
        num_parts: P.

    Raises:
        ValueError: a type, shape or device that does not fit the buffers.
    """
    num_experts, (rows, columns) = len(main_grads.buffers), main_grads.buffers[0].shape
    check_tensor("stacked", stacked, dtype=torch.bfloat16, shape=(None, columns))
    height, missing = divmod(stacked.shape[0], num_experts * num_parts)
    if missing or rows % num_parts or height * num_parts < rows:
        raise ValueError(f"stacked has {stacked.shape[0]} rows: {num_experts} gradients of {rows} do not fit into it")
    expert, part = num_parts * height * columns, height * columns
    _launch(stacked, main_grads, rows // num_parts, expert=expert, part=part, row=columns)


def add_side_by_side(stacked: Tensor, main_grads: GradientTable) -> None:
    """Add gradients [O, D] that lie side by side.

    Args:
        stacked: bf16 [O, E W]: of each expert D columns, and W - D that are left out.
        main_grads: float32 [O, D] of each expert.

    Raises:
        ValueError: a type, shape or device that does not fit the buffers.
    """
    num_experts, (rows, columns) = len(main_grads.buffers), main_grads.buffers[0].shape
    check_tensor("stacked", stacked, dtype=torch.bfloat16, shape=(rows, None))
    width, missing = divmod(stacked.shape[1], num_experts)
    if missing or width < columns:
        raise ValueError(f"stacked has {stacked.shape[1]} columns: {num_experts} of {columns} do not fit into it")
    _launch(stacked, main_grads, rows, expert=width, part=0, row=stacked.shape[1])


def _launch(stacked: Tensor, main_grads: GradientTable, part_rows: int, *, expert: int, part: int, row: int) -> None:
    num_experts, (rows, columns) = len(main_grads.buffers), main_grads.buffers[0].shape
    addresses = main_grads.addresses_for(num_experts, rows, columns)
    check_same_device(stacked=stacked, main_grads=addresses)
    if rows and columns:
        _add_kernel[(cdiv(columns, _COLUMNS), cdiv(rows, _ROWS), num_experts)](
            stacked, addresses, rows, columns, part_rows, expert, part, row, ROWS=_ROWS, COLUMNS=_COLUMNS
        )
