"""Ternary codes of many weight matrices in three launches, from fp32 or bf16 masters.

    s = max(mean|W|, 1e-5)        one per part of a weight (q, k and v share a matrix), over all its shards
    t = clamp(round(W / s), -1, 1)

`reference.ternary_codes` for every weight of a list, bit for bit.  Launch 1 sums |W| of each row, launch 2 the rows of
each part, both in float64 and in a fixed order, so that shards add up to the same float32 scale under every layout;
launch 3 reads the weights again and writes codes.  Done once per optimizer step, a model's hundred matrices cost three
launches and one all-reduce of the part sums, which the caller does between launches 2 and 3.

On request launch 3 also writes what `dispatch.Expander` would make of the codes, for 2 more bytes per weight: the codes
in bf16, times the ratio of their part's scale to the largest of the matrix, which is 1 where there is one part.

|W / s| rounds to at least 1 exactly if RN(|W| / s) > 1/2 (1/2 itself goes to the even 0), which is |W| > s / 2: the
quotient is a product by two of numbers of the same format, and no division is needed.

A table says where each row begins, so one launch serves matrices of different sizes; it is built once per model.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Expanded
from kernels.launch import check_dtype


@dataclass(frozen=True)
class RowTable:
    """Where the rows of a list of weights are, and which part each belongs to; all on the weights' device."""

    address: Tensor
    """[R] int64 first byte of each row."""
    length: Tensor
    """[R] int32 features of each row."""
    part: Tensor
    """[R] int32 part of each row; parts are numbered over the whole list."""
    offset: Tensor
    """[R] int64 first code of each row in the flat output."""
    order: Tensor
    """[R] int32 rows sorted by part."""
    part_start: Tensor
    """[P+1] int32 first position of each part in `order`."""
    part_size: Tensor
    """[P] int64 weights of each part, on this rank."""
    matrix: Tensor
    """[P] int64 weight that each part belongs to."""
    num_matrices: int
    num_codes: int
    longest: int
    """Features of the longest row."""


def row_table(weights: list[Tensor], parts: list[Tensor]) -> RowTable:
    """Describe `weights` for the kernels.

    Args:
        weights: contiguous matrices [O,D] on one device, all fp32 or all bf16.
        parts: for each weight the part of each row, [O] integers numbered from 0 within the weight.

    Raises:
        ValueError: an empty list, or a weight that is not such a matrix.
    """
    if not weights:
        raise ValueError("no weights to ternarize")
    for index, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        check_dtype(weight, f"weights[{index}]", (torch.float32, torch.bfloat16))
        check_dtype(weight, f"weights[{index}]", (weights[0].dtype,))
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(f"weights[{index}] of shape {tuple(weight.shape)} is not a contiguous matrix")
        if part.numel() != weight.shape[0]:
            raise ValueError(f"parts[{index}] names {part.numel()} rows, weights[{index}] has {weight.shape[0]}")
    device = weights[0].device
    address, length, numbered = [], [], []
    num_parts: list[int] = []
    for weight, part in zip(weights, parts, strict=True):
        rows, features = weight.shape
        address.append(weight.data_ptr() + torch.arange(rows) * features * weight.element_size())
        length.append(torch.full((rows,), features))
        numbered.append(part.cpu() + sum(num_parts))
        num_parts.append(int(part.max()) + 1)
    lengths, part_of_row = torch.cat(length), torch.cat(numbered)
    sizes = torch.zeros(sum(num_parts), dtype=torch.int64).index_add_(0, part_of_row, lengths)
    rows_per_part = torch.bincount(part_of_row, minlength=sum(num_parts))
    return RowTable(
        address=torch.cat(address).to(device),
        length=lengths.int().to(device),
        part=part_of_row.int().to(device),
        offset=(lengths.cumsum(0) - lengths).to(device),
        order=part_of_row.argsort(stable=True).int().to(device),
        part_start=torch.cat([torch.zeros(1, dtype=torch.int64), rows_per_part.cumsum(0)]).int().to(device),
        part_size=sizes.to(device),
        matrix=torch.arange(len(weights)).repeat_interleave(torch.tensor(num_parts)).to(device),
        num_matrices=len(weights),
        num_codes=int(lengths.sum()),
        longest=int(lengths.max()),
    )


@triton.jit
def _row_sums_kernel(address_ptr, length_ptr, sums_ptr, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0)
    weight_ptr = tl.load(address_ptr + row).to(tl.pointer_type(DTYPE))
    length = tl.load(length_ptr + row)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, length, CHUNK):
        index = start + tl.arange(0, CHUNK)
        total += tl.abs(tl.load(weight_ptr + index, mask=index < length, other=0.0).to(tl.float32)).to(tl.float64)
    tl.store(sums_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _part_sums_kernel(sums_ptr, order_ptr, start_ptr, out_ptr, CHUNK: tl.constexpr):
    part = tl.program_id(0)
    first = tl.load(start_ptr + part)
    last = tl.load(start_ptr + part + 1)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(first, last, CHUNK):
        index = start + tl.arange(0, CHUNK)
        row = tl.load(order_ptr + index, mask=index < last, other=0)
        total += tl.load(sums_ptr + row, mask=index < last, other=0.0)
    tl.store(out_ptr + part, tl.sum(total, axis=0))


@triton.jit
def _codes_kernel(
    address_ptr, length_ptr, part_ptr, offset_ptr, scale_ptr, codes_ptr, ratio_ptr, expanded_ptr,
    EXPANDS: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    weight_ptr = tl.load(address_ptr + row).to(tl.pointer_type(DTYPE))
    length = tl.load(length_ptr + row)
    part = tl.load(part_ptr + row)
    offset = tl.load(offset_ptr + row)
    out_ptr = codes_ptr + offset
    half = tl.load(scale_ptr + part) * 0.5
    if EXPANDS:
        ratio = tl.load(ratio_ptr + part)
    for start in range(0, length, CHUNK):
        index = start + tl.arange(0, CHUNK)
        weight = tl.load(weight_ptr + index, mask=index < length, other=0.0).to(tl.float32)
        code = tl.where(weight > half, 1, tl.where(weight < -half, -1, 0))
        tl.store(out_ptr + index, code.to(tl.int8), mask=index < length)
        if EXPANDS:
            tl.store(expanded_ptr + offset + index, code.to(tl.float32) * ratio, mask=index < length)


def part_sums(table: RowTable, dtype: torch.dtype) -> Tensor:
    """Sum of |W| of every part, [P] float64; `dtype` is the weights'."""
    sums = torch.empty(len(table.address), dtype=torch.float64, device=table.address.device)
    chunk = min(1024, triton.next_power_of_2(table.longest))
    _row_sums_kernel[(len(sums),)](table.address, table.length, sums, DTYPE=_TYPES[dtype], CHUNK=chunk, num_warps=4)
    out = torch.empty(len(table.part_size), dtype=torch.float64, device=sums.device)
    _part_sums_kernel[(len(out),)](sums, table.order, table.part_start, out, CHUNK=1024, num_warps=4)
    return out


def codes(
    table: RowTable,
    scale: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    expanded: Expanded | None = None,
) -> Tensor:
    """int8 codes of all weights, one after the other, [num_codes].

    Args:
        table: where the weights are.
        scale: [P] float32, `reference.absmean_scale` of the summed part sums.
        dtype: of the weights.
        out: where to write them; None: a new tensor.
        expanded: where to write the same in bf16, values [num_codes] and the largest scale of each weight
            [num_matrices]; None: nowhere.

    Raises:
        ValueError: an output of another type or size.
    """
    check_dtype(scale, "scale", (torch.float32,))
    if out is None:
        out = torch.empty(table.num_codes, dtype=torch.int8, device=scale.device)
    _check_output("out", out, table.num_codes, torch.int8)
    values, ratio = None, None
    if expanded is not None:
        values = _check_output("expanded.values", expanded.values, table.num_codes, torch.bfloat16)
        largest = _check_output("expanded.scale", expanded.scale, table.num_matrices, torch.float32)
        largest.zero_().scatter_reduce_(0, table.matrix, scale, "amax")
        ratio = scale / largest[table.matrix]
    chunk = min(2048, triton.next_power_of_2(table.longest))
    _codes_kernel[(len(table.address),)](
        table.address, table.length, table.part, table.offset, scale, out, ratio, values,
        EXPANDS=values is not None, DTYPE=_TYPES[dtype], CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return out


def _check_output(name: str, out: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    if out.numel() != size or out.dtype != dtype:
        raise ValueError(f"{name} has {out.numel()} elements of {out.dtype}, the weights take {size} of {dtype}")
    return out


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
