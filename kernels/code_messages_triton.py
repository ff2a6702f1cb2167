"""`code_messages` on a GPU: each code and each byte is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv

_BLOCK = 2048
"""Bytes of a message per program."""


@triton.jit
def _pack_kernel(codes_ptr, message_ptr, num_codes, num_bytes, BLOCK: tl.constexpr):
    num_bytes = num_bytes.to(tl.int64)  # 3 num_bytes may leave int32
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.zeros([BLOCK], tl.int32)
    for field in tl.static_range(4):
        index = field * num_bytes + unit
        code = tl.load(codes_ptr + index, mask=(unit < num_bytes) & (index < num_codes), other=0).to(tl.int32)
        byte |= (code & 3) << (2 * field)
    tl.store(message_ptr + unit, byte.to(tl.uint8), mask=unit < num_bytes)


@triton.jit
def _unpack_kernel(messages_ptr, starts_ptr, out_ptr, num_bytes, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    rank = tl.program_id(1).to(tl.int64)
    num_bytes = num_bytes.to(tl.int64)  # 3 num_bytes may leave int32
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts_ptr + rank)
    count = tl.load(starts_ptr + rank + 1) - start
    if ALIGNED:
        start = tl.multiple_of(start, 16)
        count = tl.multiple_of(count, 16)
    byte = tl.load(messages_ptr + rank * num_bytes + unit, mask=unit < num_bytes, other=0).to(tl.int32)
    for field in tl.static_range(4):
        index = field * num_bytes + unit
        code = (((byte >> (2 * field)) & 3) ^ 2) - 2
        tl.store(out_ptr + start + index, code.to(tl.int8), mask=(unit < num_bytes) & (index < count))


def pack(codes: Tensor, num_bytes: int) -> Tensor:
    """See `code_messages.CodeMessages.pack`."""
    message = torch.empty(num_bytes, dtype=torch.uint8, device=codes.device)
    if num_bytes:
        _pack_kernel[(cdiv(num_bytes, _BLOCK),)](codes, message, codes.numel(), num_bytes, BLOCK=_BLOCK, num_warps=4)
    return message


def unpack(messages: Tensor, starts: Tensor, out: Tensor, *, is_aligned: bool) -> None:
    """See `code_messages.CodeMessages.unpack`.

    Args:
        messages: uint8 [R, U], contiguous.
        starts: int64 [R+1], where each rank's codes begin in `out`.
        out: int8 [N].
        is_aligned: all `starts` are multiples of 16.
    """
    ranks, num_bytes = messages.shape
    if num_bytes:
        grid = (cdiv(num_bytes, _BLOCK), ranks)
        _unpack_kernel[grid](messages, starts, out, num_bytes, ALIGNED=is_aligned, BLOCK=_BLOCK, num_warps=4)
