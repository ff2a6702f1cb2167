"""One row of activations to sparse int8 codes, in registers: what every kernel that ends in such codes shares.

Four codes share a 32-bit word, one from each quarter of the row (loads stay coalesced).  `bit_planes` finds the K
largest of a whole row.  For those of a block the obvious way compares every element with a trial threshold, seven
times; here one addition compares all four: for keys k <= 127 and a threshold t in 1..127 the byte k + (128 - t) has its
top bit set exactly if k >= t, and never carries into the next.

A row of bf16 stays bf16, two to a register, wherever it waits: for its largest magnitude, its scale, its mean square.

Exactness:

* A code is rint(RN(x / s)).  For bf16 one multiplication gives it (`code_multiplier`); other types divide.
* rint is the addition of 1.5 * 2^23, whose sum holds the two's complement code in its lowest byte.
* Ties go to the lowest index: the tied codes are numbered by a prefix sum in index order, and the first ones fill up
  to K.  A zero code is the same kept or dropped, so only thresholds of at least 1 are searched.

A quarter is a tile [N, 8] of N lines of 8 features, or with blocks of M features [N, M rounded up to a power of two].
"""

import triton
import triton.language as tl

from kernels.bit_planes import keep_largest_codes
from kernels.words import four_bytes, larger_magnitude, low_bytes, widened

_ONES = tl.constexpr(0x01010101)
_TOPS = tl.constexpr(-0x7F7F7F80)
"""0x80808080 as int32."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to |v| < 2^22 rounds v to an integer, half to even."""
_EPS = tl.constexpr(9.999999747378752e-06)
"""float32(1e-5): every float32 up to it is below the clamp, which is the float64 1e-5."""
_EPS_SCALE = tl.constexpr(7.874015750530816e-08)
"""float32(1e-5 / 127)."""


@triton.jit
def row_scale(gamma):
    """float32 scale from max|x| of a row; NaN stays NaN."""
    return tl.where(gamma <= _EPS, _EPS_SCALE, tl.div_rn(gamma, 127.0))


@triton.jit
def larger(a, b):
    """Maximum in which NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def code_multiplier(gamma, scale):
    """A factor f with rint(x f) = rint(RN(x / scale)) for every bf16 |x| <= gamma, gamma being bf16.

    x / gamma is a ratio of 8-bit significands, so 127 x / gamma is either k + 1/2 exactly or at least 1.5e-5 (relative)
    away from it: errors of 2^-20 cannot move a code across.  127 is prime, so k + 1/2 is met only at x = gamma / 2, or
    where gamma's significand is twice 127: the scale is a power of two then, and the product exact.  The rounding of
    the scale decides to which side RN(x / scale) falls at gamma / 2, and f leans to the same side.
    """
    inverse = tl.div_rn(1.0, scale)
    power_of_two = (scale.to(tl.int32, bitcast=True) & 0x7FFFFF) == 0
    lean = tl.where(tl.div_rn(gamma * 0.5, scale) >= 63.5, 1.0 + 2.0**-20, 1.0 - 2.0**-20)
    return tl.where(power_of_two, inverse, inverse * lean)


@triton.jit
def code_bits(x, scale, factor, FACTOR: tl.constexpr):
    """An int32 whose low byte is the two's complement code of x."""
    rounded = tl.fma(widened(x), factor, _ROUND) if FACTOR else tl.div_rn(widened(x), scale) + _ROUND
    return rounded.to(tl.int32, bitcast=True)


@triton.jit
def magnitude_bytes(codes):
    """|q| of four int8 codes in a word; the code -128 does not occur."""
    negative = (codes >> 7) & _ONES
    return (codes ^ (negative * 255)) + negative


@triton.jit
def quarter_tile(quarter, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Places [ROWS, COLUMNS] in a quarter, and which of them there are; COLUMNS is 8, or BLOCK rounded up."""
    line = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    width: tl.constexpr = BLOCK if BLOCK > 0 else COLUMNS
    index = line * width + column
    return index, (index < quarter) & (column < width)


@triton.jit
def load_quarter(row_ptr, index, quarter, features, part: tl.constexpr, mask):
    """Features of one quarter of a row, 0 beyond the end."""
    feature = index + part * quarter
    return tl.load(row_ptr + feature, mask=mask & (feature < features), other=0.0)


@triton.jit
def _store_quarter(row_ptr, index, quarter, features, part: tl.constexpr, mask, codes):
    feature = index + part * quarter
    tl.store(row_ptr + feature, codes, mask=mask & (feature < features))


@triton.jit
def row_gamma(x0, x1, x2, x3):
    """max|x| of a row."""
    largest = larger_magnitude(larger_magnitude(x0, x1), larger_magnitude(x2, x3))
    return tl.reduce(tl.reduce(widened(largest), 1, larger), 0, larger)


@triton.jit
def pack_codes(x0, x1, x2, x3, gamma, scale, FACTOR: tl.constexpr):
    """Absmax codes of a row's four quarters, one byte each."""
    factor = code_multiplier(gamma, scale)
    return low_bytes(
        code_bits(x0, scale, factor, FACTOR),
        code_bits(x1, scale, factor, FACTOR),
        code_bits(x2, scale, factor, FACTOR),
        code_bits(x3, scale, factor, FACTOR),
    )


@triton.jit
def _at_least(keys, threshold):
    """Flag byte 1 where a key byte is >= the threshold's byte (thresholds in 1..128, keys at most 127)."""
    return ((keys + (_TOPS - threshold)) >> 7) & _ONES


@triton.jit
def _equal(keys, threshold):
    return ((((keys ^ threshold) + 0x7F7F7F7F) >> 7) & _ONES) ^ _ONES


@triton.jit
def _block_keep(keys, kept):
    """Flag bytes of exactly `kept` largest keys along axis 1 of [S, M], for the four blocks of each word."""
    wanted = kept * _ONES
    threshold = tl.zeros([keys.shape[0], 1], tl.int32)
    for step in tl.static_range(7):
        trial = threshold | (_ONES << (6 - step))
        counts = tl.sum(_at_least(keys, trial), axis=1, keep_dims=True)
        enough = _at_least(counts, wanted)
        threshold = threshold | (enough << (6 - step))
    above = _at_least(keys, threshold + _ONES)
    ties = _equal(keys, threshold)
    free = wanted - tl.sum(above, axis=1, keep_dims=True)
    # rank <= free, at most 64 both; a threshold of 0 makes every zero a tie, and keeping a zero code changes nothing.
    return above | (ties & (((free + _TOPS) - tl.cumsum(ties, axis=1)) >> 7))


@triton.jit
def store_largest(
    codes, row_ptr, index, quarter, features, mask, kept, SPARSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the packed codes of one row, all but the `kept` largest of the row (or of each block) set to 0."""
    if SPARSE:
        if BLOCK > 0:
            codes = codes & (_block_keep(magnitude_bytes(codes), kept) * 255)
        else:
            codes = keep_largest_codes(codes, kept)
    b0, b1, b2, b3 = four_bytes(codes)
    _store_quarter(row_ptr, index, quarter, features, 0, mask, b0)
    _store_quarter(row_ptr, index, quarter, features, 1, mask, b1)
    _store_quarter(row_ptr, index, quarter, features, 2, mask, b2)
    _store_quarter(row_ptr, index, quarter, features, 3, mask, b3)


@triton.jit
def store_codes(
    x0, x1, x2, x3, gamma, codes_ptr, scale_ptr, row, index, quarter, features, mask, kept,
    SPARSE: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Scale and sparse codes of a row, given its four quarters and the max|x| that they are scaled by."""
    scale = row_scale(gamma)
    tl.store(scale_ptr + row, scale)
    codes = pack_codes(x0, x1, x2, x3, gamma, scale, FACTOR)
    store_largest(codes, codes_ptr + row * features, index, quarter, features, mask, kept, SPARSE, BLOCK)
