"""Triton programs of the products that skip the weights of zero activations; `kernels/decode.py` launches them.

A warp's 32 lanes lie side by side along the outputs and take one feature's weights at a time, 128 bytes or more in one
load.  Whether a feature is zero is then the same question for a whole warp, so skipping costs one predicate and needs
no list of nonzeros; nothing has to be summed across lanes; and warps split the features.  All loads of a chunk are
under way before the first one is used: at one token the time is latency as much as bytes.  Chunks are a loop, steps of
a chunk are not: unrolling the chunks of sixteen tokens takes the compiler minutes.

Ternary.  One feature's int32 word holds 16 outputs.  The byte-wise dot product of the integer units (dp4a) wants four
features of one output in a word, which depend on nothing but the position: four words, one per feature of an aligned
group of four, are transposed as a 4 x 4 matrix of bytes.  A byte holds the codes c = t + 1 of four outputs,

    byte = c_0 + 4 c_1 + 16 c_2 + 64 c_3
    S_p  = sum over features of x (byte mod 4^(p+1)),   sum of x c_p = (S_p - S_(p-1)) / 4^p,   S_(-1) = 0,

exact in 32 bits, and sum of x t = sum of x c - sum of x.  A word with its 16 weights costs 2 byte permutations, 3
masks and 4 dot products; the obvious shift, mask, multiply and add for each weight are 48 instructions.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
import triton
import triton.language as tl

from kernels.decode_finish import add_and_finish, arrived_last, wait_for_previous_kernel


@triton.jit
def _permute_bytes(a, b, SELECTOR: tl.constexpr, INTERPRET: tl.constexpr):
    """The bytes of (a, b), numbered 0 to 7, that the digits of SELECTOR name, lowest digit first."""
    if INTERPRET:
        permuted = a & 0
        for place in tl.static_range(4):
            digit = (SELECTOR >> (4 * place)) & 7
            permuted |= (((a if digit < 4 else b) >> (8 * (digit % 4))) & 255) << (8 * place)
    else:
        permuted = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, SELECTOR], dtype=tl.int32, is_pure=True, pack=1
        )
    return permuted


@triton.jit
def _add_dot4(unsigned, signed, total, INTERPRET: tl.constexpr):
    """total + the sum over four bytes of unsigned * signed."""
    if INTERPRET:
        for byte in tl.static_range(4):
            total += ((unsigned >> (8 * byte)) & 255) * ((signed << (24 - 8 * byte)) >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [unsigned, signed, total], dtype=tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def _add_byte(totals, byte_of_four, x, INTERPRET: tl.constexpr):
    """Add one byte column to its four nested sums S_0 .. S_3."""
    return (
        _add_dot4(byte_of_four & 0x03030303, x, totals[0], INTERPRET),
        _add_dot4(byte_of_four & 0x0F0F0F0F, x, totals[1], INTERPRET),
        _add_dot4(byte_of_four & 0x3F3F3F3F, x, totals[2], INTERPRET),
        _add_dot4(byte_of_four, x, totals[3], INTERPRET),
    )


@triton.jit
def _join4(a, b, c, d):
    """[..., 2, 2], which reads as a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _code_sums(first, second, third, fourth):
    """[..., 2, 2, 2, 2]: sums of x c for the 16 codes of a word, lowest bits first, from its bytes' nested sums."""
    return _join4(
        _join4(first[0], second[0], third[0], fourth[0]),
        _join4(first[1] - first[0], second[1] - second[0], third[1] - third[0], fourth[1] - fourth[0]) >> 2,
        _join4(first[2] - first[1], second[2] - second[1], third[2] - third[1], fourth[2] - fourth[1]) >> 4,
        _join4(first[3] - first[2], second[3] - second[2], third[3] - third[2], fourth[3] - fourth[2]) >> 6,
    )


@triton.jit
def _sum_last_axis(x, LENGTH: tl.constexpr):
    """[N] from [N, LENGTH] by halving, in a fixed order.

    `tl.sum` exchanges partial sums between warps with a stride of a whole row of banks, 32 times slower.
    """
    for _ in tl.static_range(LENGTH.bit_length() - 1):
        even, odd = tl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
        x = even + odd
    return x.reshape([x.shape[0]])


@triton.jit(do_not_specialize_on_alignment=["weight_scale_ptr", "y_ptr", "sums_ptr"])
def ternary_gemv_kernel(
    words_ptr,  # int32 [D, W]
    x_ptr,  # int32 [T, D / 4]: four int8 codes each
    x_scale_ptr,  # float32 [T]
    weight_scale_ptr,  # float32 [O]
    y_ptr,  # bf16 [T, O]
    sums_ptr,  # int32 [T, O], zeros before and after
    num_groups,  # D / 4
    num_outputs,
    count_shift,
    WORDS_PER_ROW: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (word tiles, splits, tokens); each warp sums CHUNKS * STEPS groups of four features for 32 words.

    The pointers of the epilogue are taken for unaligned: atomics have no wide form, so that lanes of one output each
    fill the most of a cache line.
    """
    tile, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    wait_for_previous_kernel(OVERLAP)
    word_L = tile * 32 + tl.arange(0, 32)
    none = tl.zeros([32, WARPS], tl.int32)
    warp_LG = none + (split * WARPS + tl.arange(0, WARPS))[None, :]
    inside_LG = none + word_L[:, None] < WORDS_PER_ROW
    x_sum, first, second, third, fourth = none, (none,) * 4, (none,) * 4, (none,) * 4, (none,) * 4
    for chunk in tl.range(CHUNKS, num_stages=1):
        group_LG = (warp_LG * CHUNKS + chunk) * STEPS
        row_ptr = words_ptr + group_LG.to(tl.int64) * (4 * WORDS_PER_ROW) + word_L[:, None]
        x = ()
        for step in tl.static_range(STEPS):
            x += (tl.load(x_ptr + token * num_groups + group_LG + step, mask=group_LG + step < num_groups, other=0),)
        words = ()
        for row in tl.static_range(4 * STEPS):
            wanted_LG = (x[row // 4] & (-16777216 if row % 4 == 3 else 255 << 8 * (row % 4))) != 0
            if WORDS_PER_ROW % 32 != 0:
                wanted_LG &= inside_LG
            # No `other`: whatever a skipped load leaves behind is multiplied by zero.
            words += (tl.load(row_ptr + row * WORDS_PER_ROW, mask=wanted_LG),)
        for step in tl.static_range(STEPS):
            low_ab = _permute_bytes(words[4 * step], words[4 * step + 1], 0x5140, INTERPRET)
            low_cd = _permute_bytes(words[4 * step + 2], words[4 * step + 3], 0x5140, INTERPRET)
            high_ab = _permute_bytes(words[4 * step], words[4 * step + 1], 0x7362, INTERPRET)
            high_cd = _permute_bytes(words[4 * step + 2], words[4 * step + 3], 0x7362, INTERPRET)
            first = _add_byte(first, _permute_bytes(low_ab, low_cd, 0x5410, INTERPRET), x[step], INTERPRET)
            second = _add_byte(second, _permute_bytes(low_ab, low_cd, 0x7632, INTERPRET), x[step], INTERPRET)
            third = _add_byte(third, _permute_bytes(high_ab, high_cd, 0x5410, INTERPRET), x[step], INTERPRET)
            fourth = _add_byte(fourth, _permute_bytes(high_ab, high_cd, 0x7632, INTERPRET), x[step], INTERPRET)
            x_sum = _add_dot4(none + 0x01010101, x[step], x_sum, INTERPRET)
    sums_LG = _code_sums(first, second, third, fourth) - x_sum[:, :, None, None, None, None]
    sums_O = _sum_last_axis(tl.permute(sums_LG, (2, 3, 4, 5, 0, 1)).reshape([512, WARPS]), WARPS)
    slot_O, word_O = tl.arange(0, 512) // 32, tile * 32 + tl.arange(0, 512) % 32
    output_O = slot_O * WORDS_PER_ROW + word_O
    kept_O = (word_O < WORDS_PER_ROW) & (output_O < num_outputs)
    scale_O = tl.load(x_scale_ptr + token) * tl.load(weight_scale_ptr + output_O, mask=kept_O, other=0.0)
    add_and_finish(
        sums_ptr + token * num_outputs, y_ptr + token * num_outputs, output_O, sums_O, scale_O, kept_O,
        count_shift, tl.num_programs(1),
    )  # fmt: skip


@triton.jit
def _load_steps(x_ptr, first, num_features, STEPS: tl.constexpr):
    """Activations `first` to `first` + STEPS, as float32."""
    x = ()
    for step in tl.static_range(STEPS):
        x += (tl.load(x_ptr + first + step, mask=first + step < num_features, other=0.0).to(tl.float32),)
    return x


@triton.jit
def float_gemv_kernel(
    weight_ptr,  # bf16 [D, O]
    x_ptr,  # bf16 [T, D]
    y_ptr,  # bf16 [T, O]
    partial_ptr,  # float32 [T, splits, O]
    arrivals_ptr,  # int32 [T, tiles], zeros before and after
    num_features,
    NUM_OUTPUTS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (tiles of 256 outputs, splits, tokens); a lane holds 8 outputs, 16 bytes; the last adds splits in order."""
    tile, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    wait_for_previous_kernel(OVERLAP)
    output_VL = tile * 256 + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 32)[None, :]
    warp_LG = tl.zeros([32, WARPS], tl.int32) + (split * WARPS + tl.arange(0, WARPS))[None, :]
    x_ptr += token * num_features
    x = _load_steps(x_ptr, warp_LG * CHUNKS * STEPS, num_features, STEPS)
    total_VLG = tl.zeros([8, 32, WARPS], tl.float32)
    for chunk in tl.range(CHUNKS, num_stages=1):
        feature_LG = (warp_LG * CHUNKS + chunk) * STEPS
        row_ptr = weight_ptr + feature_LG.to(tl.int64)[None, :, :] * NUM_OUTPUTS + output_VL[:, :, None]
        weights = ()
        for step in tl.static_range(STEPS):
            wanted_VLG = (x[step] != 0)[None, :, :] & (output_VL < NUM_OUTPUTS)[:, :, None]
            weights += (tl.load(row_ptr + step * NUM_OUTPUTS, mask=wanted_VLG, other=0.0),)
        later_x = _load_steps(x_ptr, feature_LG + STEPS, num_features, STEPS)  # for nothing in the last chunk
        for step in tl.static_range(STEPS):
            total_VLG += weights[step].to(tl.float32) * x[step][None, :, :]
        x = later_x
    sums_O = _sum_last_axis(tl.permute(total_VLG, (1, 0, 2)).reshape([256, WARPS]), WARPS)
    output_O = tile * 256 + tl.arange(0, 256)
    partial_ptr += token * SPLITS * NUM_OUTPUTS
    tl.store(partial_ptr + split * NUM_OUTPUTS + output_O, sums_O, mask=output_O < NUM_OUTPUTS)
    if arrived_last(arrivals_ptr + token * tl.num_programs(0) + tile, SPLITS):
        y_O = tl.zeros([256], tl.float32)
        for start in tl.static_range(0, SPLITS, 16):
            split_S1 = start + tl.arange(0, 16)[:, None]
            wanted_SO = (split_S1 < SPLITS) & (output_O < NUM_OUTPUTS)[None, :]
            at_SO = split_S1 * NUM_OUTPUTS + output_O[None, :]
            y_O += tl.sum(tl.load(partial_ptr + at_SO, mask=wanted_SO, other=0.0, cache_modifier=".cg"), axis=0)
        stored_O = y_O.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + token * NUM_OUTPUTS + output_O, stored_O, mask=output_O < NUM_OUTPUTS)
