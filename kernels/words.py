"""Single instructions on 32-bit words where Triton finds several: pairs of bf16, four bytes, 32 bits.

A kernel that reads 2 bytes and writes 1 has some thirty instructions per element before it takes longer than memory
does.  Triton widens, rounds and splits element by element; here neighbouring elements of a thread share an instruction.
The values are those of the plain operations, which Triton's interpreter computes instead, and tiles that are smaller
than what one instruction takes.
"""

import triton
import triton.language as tl

from kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_ONES = tl.constexpr(0x01010101)


@triton.jit
def widened(x):
    """float32 of bf16, or of another type."""
    if _INTERPRETED or x.dtype != tl.bfloat16 or x.numel < 2:
        wide = x.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return wide


@triton.jit
def nearest(x):
    """bf16 of float32, ties to even."""
    if _INTERPRETED or x.numel < 2:
        near = x.to(tl.bfloat16)
    else:
        near = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return near


@triton.jit
def larger_magnitude(a, b):
    """max(|a|, |b|) in which NaN wins."""
    if _INTERPRETED or a.dtype != tl.bfloat16 or a.numel < 2:
        magnitude = tl.maximum(tl.abs(widened(a)), tl.abs(widened(b)), propagate_nan=tl.PropagateNan.ALL)
    else:
        magnitude = tl.inline_asm_elementwise(
            "{ .reg .b32 p, q; abs.bf16x2 p, $1; abs.bf16x2 q, $2; max.NaN.bf16x2 $0, p, q; }",
            "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return magnitude


@triton.jit
def low_bytes(a, b, c, d):
    """A word of the lowest bytes of four words, that of a lowest."""
    if _INTERPRETED:
        word = ((a & 0xFF) | ((b & 0xFF) << 8)) | (((c & 0xFF) | (d << 8)) << 16)
    else:
        word = tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; prmt.b32 low, $1, $2, 0x0040; prmt.b32 high, $3, $4, 0x0040; "
            "prmt.b32 $0, low, high, 0x5410; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return word


@triton.jit
def four_bytes(word):
    """Bytes 0, 1, 2 and 3 of each word as int8."""
    if _INTERPRETED or word.numel < 4:
        b0, b1, b2, b3 = word.to(tl.int8), (word >> 8).to(tl.int8), (word >> 16).to(tl.int8), (word >> 24).to(tl.int8)
    else:
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            "{ .reg .b32 p, q, r, s; prmt.b32 p, $4, $5, 0x5140; prmt.b32 q, $6, $7, 0x5140; "
            "prmt.b32 r, $4, $5, 0x7362; prmt.b32 s, $6, $7, 0x7362; prmt.b32 $0, p, q, 0x5410; "
            "prmt.b32 $1, p, q, 0x7632; prmt.b32 $2, r, s, 0x5410; prmt.b32 $3, r, s, 0x7632; }",
            "=&r,=&r,=&r,=&r,r,r,r,r", [word], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    return b0, b1, b2, b3


@triton.jit
def select_bits(a, b, MASK: tl.constexpr):
    """Bits of a where the mask has ones, of b elsewhere."""
    if _INTERPRETED:
        bits = (a & MASK) | (b & ~MASK)
    else:
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xe4;", "=r,r,r,r", [a, b, MASK], dtype=tl.int32, is_pure=True, pack=1
        )
    return bits


@triton.jit
def byte_masks(bits, BIT: tl.constexpr):
    """0xFF in the bytes whose bit BIT is set, else 0."""
    if _INTERPRETED:
        masks = ((bits >> BIT) & _ONES) * 255
    else:
        masks = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0xba98;", "=r,r", [bits << (7 - BIT)], dtype=tl.int32, is_pure=True, pack=1
        )
    return masks


@triton.jit
def bits_of_bytes(bits):
    """How many bits of each byte are set, 0 to 8 in that byte."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (nibbles + (nibbles >> 4)) & 0x0F0F0F0F


@triton.jit
def bits_of_words(bits):
    """How many bits of each word are set."""
    if _INTERPRETED:
        count = (bits_of_bytes(bits) * _ONES) >> 24
    else:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1)
    return count
