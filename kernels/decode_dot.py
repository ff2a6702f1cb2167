"""The Triton program of the dense product on the int8 matrix units; `kernels/decode.py` launches it.

Row layout.  Masking a shifted word leaves 64 t in each byte, which is an int8 operand as it stands: half an instruction
per weight.  The sum of 64 x t over D < 2^17 features stays below 2^30; a shift by 6 ends it.  The matrix units take 16
tokens at the price of one.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.decode_finish import add_and_finish, wait_for_previous_kernel
from kernels.tile_launch import loop_bound


@triton.jit
def _signed_bytes(words):
    """64 t for the code t & 3 in the top two bits of each byte: int8 [..., 2, 2], in the order of the bytes."""
    fields = words & -0x3F3F3F40  # 0xC0C0C0C0
    even = tl.join(fields.to(tl.int8), (fields >> 16).to(tl.int8))
    odd = tl.join((fields >> 8).to(tl.int8), (fields >> 24).to(tl.int8))
    return tl.join(even, odd)


@triton.jit
def ternary_dot_kernel(
    words_ptr,  # int32 [O, W]
    x_ptr,  # int8 [T, D]
    x_scale_ptr,  # float32 [T]
    weight_scale_ptr,  # float32 [O]
    y_ptr,  # bf16 [T, O]
    sums_ptr,  # int32 [T, O], zeros before and after
    num_tokens,
    num_features,
    num_outputs,
    words_per_row,
    words_per_program,
    count_shift,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (output tiles, splits over words): int8 matrix units, up to 16 tokens, every feature."""
    tile, split = tl.program_id(0), tl.program_id(1)
    wait_for_previous_kernel(OVERLAP)
    outputs = tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    tokens = tl.arange(0, 16)
    first = split * words_per_program
    end = tl.minimum(first + words_per_program, words_per_row)
    total_OT = tl.zeros([BLOCK_OUTPUTS, 16], tl.int32)
    steps = tl.cdiv(end - first, BLOCK_WORDS)
    for step in tl.range(0, loop_bound(steps, INTERPRET), num_stages=STAGES):
        start = first + step * BLOCK_WORDS
        words = start + tl.arange(0, BLOCK_WORDS)
        words_OW = tl.load(
            words_ptr + outputs.to(tl.int64)[:, None] * words_per_row + words[None, :],
            mask=(outputs < num_outputs)[:, None] & (words < end)[None, :],
            other=0,
        )
        for plane in tl.static_range(4):
            feature = plane * 4 * words_per_row + 4 * start + tl.arange(0, 4 * BLOCK_WORDS)
            wanted = (feature < plane * 4 * words_per_row + 4 * end) & (feature < num_features)
            x_KT = tl.load(
                x_ptr + tokens[None, :].to(tl.int64) * num_features + feature[:, None],
                mask=(tokens < num_tokens)[None, :] & wanted[:, None],
                other=0,
            )
            weight_OK = _signed_bytes(words_OW << (6 - 2 * plane)).reshape([BLOCK_OUTPUTS, 4 * BLOCK_WORDS])
            total_OT = tl.dot(weight_OK, x_KT, total_OT, out_dtype=tl.int32)
    output_OT = tokens[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    inside_OT = (tokens < num_tokens)[None, :] & (outputs < num_outputs)[:, None]
    x_scale_T = tl.load(x_scale_ptr + tokens, mask=tokens < num_tokens, other=0.0)
    weight_scale_O = tl.load(weight_scale_ptr + outputs, mask=outputs < num_outputs, other=0.0)
    scale_OT = x_scale_T[None, :] * weight_scale_O[:, None]
    add_and_finish(sums_ptr, y_ptr, output_OT, total_OT >> 6, scale_OT, inside_OT, count_shift, tl.num_programs(1))
