"""The K largest of a row of int8 codes, 32 codes at a time: what the kernels with top-K of a whole row share.

The K-th largest of 128 magnitudes is found in seven trials.  The obvious trial compares every code with a threshold.
Here each word of 32 bits holds one bit of 32 codes (the transpose of eight words of four codes), and a trial asks which
codes that agree with the threshold so far have a one in its next bit: `and`, a count of bits, a sum over the row.
Transposing takes 1.5 instructions per code, and each trial a tenth of one instead of one.

Exactly K remain: codes of the threshold's magnitude are kept in order of their index until K are.  A zero code is the
same kept or dropped.

Rows that several ranks share are counted instead, first by the upper four bits of the magnitude, then by the lower
three of those with the upper ones of the K-th largest.

Words of codes are [N, 8], N lines of 8 features, with byte p of quarter p of the row; in a word of a plane, [N], bit c
of byte p is of column c.
"""

import triton
import triton.language as tl

from kernels.words import bits_of_bytes, bits_of_words, byte_masks, select_bits

_ONES = tl.constexpr(0x01010101)
_TOPS = tl.constexpr(-0x7F7F7F80)
"""0x80808080 as int32."""
_ODD_BYTES_OFF = tl.constexpr(0x00FF00FF)


@triton.jit
def _exchange(a, b, BITS: tl.constexpr, LOW: tl.constexpr):
    """Of fields of 2 `BITS` bits: a word of the low halves and one of the high halves, those of b above those of a."""
    return select_bits(a, b << BITS, LOW), select_bits(a >> BITS, b, LOW)


@triton.jit
def _bit_planes(codes):
    """Bits 0, 1, ... 7 of the codes [N, 8], each [N]."""
    even_columns, odd_columns = tl.split(tl.reshape(codes, [codes.shape[0], 2, 2, 2]))
    even, odd = _exchange(even_columns, odd_columns, 1, 0x55555555)
    e0, e1 = tl.split(even)
    o0, o1 = tl.split(odd)
    bits04, bits26 = _exchange(e0, e1, 2, 0x33333333)
    bits15, bits37 = _exchange(o0, o1, 2, 0x33333333)
    e0, e1 = tl.split(bits04)
    e2, e3 = tl.split(bits26)
    o0, o1 = tl.split(bits15)
    o2, o3 = tl.split(bits37)
    p0, p4 = _exchange(e0, e1, 4, 0x0F0F0F0F)
    p1, p5 = _exchange(o0, o1, 4, 0x0F0F0F0F)
    p2, p6 = _exchange(e2, e3, 4, 0x0F0F0F0F)
    p3, p7 = _exchange(o2, o3, 4, 0x0F0F0F0F)
    return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def _magnitudes(codes):
    """Bits 0 to 6 of |code|: a negative number's bits above its lowest one are inverted."""
    p0, p1, p2, p3, p4, p5, p6, sign = _bit_planes(codes)
    below2 = p0 | p1
    below3 = below2 | p2
    below4 = below3 | p3
    below5 = below4 | p4
    below6 = below5 | p5
    return (
        p0, p1 ^ (sign & p0), p2 ^ (sign & below2), p3 ^ (sign & below3), p4 ^ (sign & below4), p5 ^ (sign & below5),
        p6 ^ (sign & below6),
    )  # fmt: skip


@triton.jit
def _search(plane, above, ties, free):
    """One bit of the threshold: a one if at least `free` of the ties have it, who else are above the threshold."""
    ones = ties & plane
    count = tl.sum(bits_of_words(ones), axis=0)
    fewer = tl.where(count < free, -1, 0)
    return above | (ones & fewer), ties & (plane ^ fewer), free - (count & fewer)


@triton.jit
def _descend(plane, above, ties, bit):
    """As `_search`, where the bit of the threshold is known."""
    fewer = bit - 1  # all ones, if the threshold has a zero
    ones = ties & plane
    return above | (ones & fewer), ties & (plane ^ fewer)


@triton.jit
def _clamp(count):
    """To what a line of 8 can use."""
    return tl.minimum(tl.maximum(count, 0), 8)


@triton.jit
def _halves(word):
    return word.to(tl.int32), (word >> 32).to(tl.int32)


@triton.jit
def _first_ties(ties, free):
    """The first `free` ties: those of lower quarters, then of lower lines of a quarter, then of lower columns."""
    # Lines count in bytes, rows in 16-bit lanes: quarters 0 and 2 in the lower 32 bits, 1 and 3 in the upper ones.
    in_line = bits_of_bytes(ties)
    counts = (in_line & _ODD_BYTES_OFF).to(tl.int64) | (((in_line >> 8) & _ODD_BYTES_OFF).to(tl.int64) << 32)
    even_total, odd_total = _halves(tl.sum(counts, axis=0))
    even_before, odd_before = _halves(tl.cumsum(counts, axis=0) - counts)
    left0 = _clamp(free - (even_before & 0xFFFF))
    free -= even_total & 0xFFFF
    left1 = _clamp(free - (odd_before & 0xFFFF))
    free -= odd_total & 0xFFFF
    left2 = _clamp(free - (even_before >> 16))
    free -= even_total >> 16
    left3 = _clamp(free - (odd_before >> 16))
    left = ((left0 | (left1 << 8)) | ((left2 | (left3 << 8)) << 16)) | _TOPS
    first = tl.zeros_like(ties)
    for column in tl.static_range(8):  # the top bit of a byte goes when more ties have come than are left
        left -= (ties >> column) & _ONES
        first = select_bits(first >> 1, left, 0x7F7F7F7F)
    return first & ties


@triton.jit
def keep_largest_codes(codes, kept):
    """`codes` [N, 8] with all but the `kept` largest magnitudes of the row set to 0, ties to the lowest index."""
    m0, m1, m2, m3, m4, m5, m6 = _magnitudes(codes)
    above = tl.zeros_like(m0)
    above, ties, free = _search(m6, above, above - 1, kept)
    above, ties, free = _search(m5, above, ties, free)
    above, ties, free = _search(m4, above, ties, free)
    above, ties, free = _search(m3, above, ties, free)
    above, ties, free = _search(m2, above, ties, free)
    above, ties, free = _search(m1, above, ties, free)
    above, ties, free = _search(m0, above, ties, free)
    return _masked(codes, above | _first_ties(ties, free))


@triton.jit
def _with_prefix(prefix, m6, m5, m4, m3):
    """Codes whose magnitude has these four upper bits."""
    above = tl.zeros_like(m6)
    above, ties = _descend(m6, above, above - 1, prefix >> 3)
    above, ties = _descend(m5, above, ties, (prefix >> 2) & 1)
    above, ties = _descend(m4, above, ties, (prefix >> 1) & 1)
    return _descend(m3, above, ties, prefix & 1)


@triton.jit
def keep_above(codes, threshold, free):
    """`codes` [N, 8] with all magnitudes but those above `threshold` and the first `free` of its ties set to 0."""
    m0, m1, m2, m3, m4, m5, m6 = _magnitudes(codes)
    above, ties = _with_prefix(threshold >> 3, m6, m5, m4, m3)
    above, ties = _descend(m2, above, ties, (threshold >> 2) & 1)
    above, ties = _descend(m1, above, ties, (threshold >> 1) & 1)
    above, ties = _descend(m0, above, ties, threshold & 1)
    return _masked(codes, above | _first_ties(ties, free))


@triton.jit
def _count_halves(word, plane):
    """How many codes of `word` have a zero, and in the upper 16 bits how many have a one."""
    ones = word & plane
    return tl.sum(bits_of_words(word ^ ones) | (bits_of_words(ones) << 16), axis=0)


@triton.jit
def store_coarse_counts(codes, counts_ptr, beyond):
    """16 counts of 16 bits: magnitudes 0 to 7, 8 to 15, ...; `beyond` of the places [N, 8, 4] are none of the row's."""
    _, _, _, m3, m4, m5, m6 = _magnitudes(codes)
    for pair in tl.static_range(8):  # bits 6, 5 and 4
        word = (m6 ^ ((pair >> 2) - 1)) & (m5 ^ (((pair >> 1) & 1) - 1)) & (m4 ^ ((pair & 1) - 1))
        counts = _count_halves(word, m3)
        tl.store(counts_ptr + pair, counts - beyond if pair == 0 else counts)


@triton.jit
def store_fine_counts(codes, prefix, counts_ptr, beyond):
    """8 counts of 16 bits: magnitudes 8 prefix, 8 prefix + 1, ...; `beyond` as for `store_coarse_counts`."""
    m0, m1, m2, m3, m4, m5, m6 = _magnitudes(codes)
    _, ties = _with_prefix(prefix, m6, m5, m4, m3)
    for pair in tl.static_range(4):  # bits 2 and 1
        counts = _count_halves(ties & (m2 ^ ((pair >> 1) - 1)) & (m1 ^ ((pair & 1) - 1)), m0)
        tl.store(counts_ptr + pair, counts - tl.where(prefix == 0, beyond, 0) if pair == 0 else counts)


@triton.jit
def _masked(codes, keep):
    even = tl.join(_masks_of_two(keep, 0, 4), _masks_of_two(keep, 2, 6))
    odd = tl.join(_masks_of_two(keep, 1, 5), _masks_of_two(keep, 3, 7))
    return codes & tl.reshape(tl.join(even, odd), codes.shape)


@triton.jit
def _masks_of_two(keep, FIRST: tl.constexpr, SECOND: tl.constexpr):
    return tl.join(byte_masks(keep, FIRST), byte_masks(keep, SECOND))
