"""Triton programs of the decode products; `kernels/decode.py` checks arguments and launches them.

Ternary, column layout.  A program takes up to 128 features (rows of packed words) for one token and a tile of words,
loads all of it at once, and sums code * x down the rows.  Decoding costs about 1.5 instructions per weight:

    sum over d of x_d t_d  =  sum of x_d c_d  -  sum of x_d              c = t + 1 in {0, 1, 2}
    ((word >> 2 p) & 0x00030003) * x  =  2^16 (c_high x) + c_low x        two weights per multiplication

Both halves are sums of at most 128 terms with -128 <= x <= 127, so they stay in [-32768, 32512], fit 16 bits, and come
apart exactly: low = sign extension of the lower half, high = (sum - low) >> 16.

Ternary, row layout.  Masking a shifted word leaves 64 t in each byte, which is an int8 operand as it stands: half an
instruction per weight.  The sum of 64 x t over D < 2^17 features stays below 2^30; a shift by 6 ends it.

Programs add their int32 sums with atomics, which is exact in any order.  The last program to arrive at a tile of a
token scales, rounds and stores the outputs, and leaves zeros behind, so one launch does everything and the next launch
finds a clean workspace.  The obvious second kernel for the reduction would cost as much time as the product.

Feature modes (FEATURES):
    "all"       every feature: dense activations
    "nonzero"   every feature is looked at, but weights of zero activations are not loaded
    "listed"    features come from an index list, so that zeros cost neither loads nor arithmetic
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.tile_launch import loop_bound

PACKED_ROWS = 128
"""Most terms whose packed sum is exact."""


@triton.jit
def _plane(words, x, PLANE: tl.constexpr):
    """Packed products of planes PLANE (lower half) and PLANE + 8 (upper half)."""
    return ((words >> (2 * PLANE)) & 0x00030003) * x


@triton.jit
def _packed_products(words_RW, x_R):
    """[R, W, 2, 2, 2] packed products; the last three axes spell the plane, highest bit first."""
    x = x_R[:, None]
    even = tl.join(
        tl.join(_plane(words_RW, x, 0), _plane(words_RW, x, 4)), tl.join(_plane(words_RW, x, 2), _plane(words_RW, x, 6))
    )
    odd = tl.join(
        tl.join(_plane(words_RW, x, 1), _plane(words_RW, x, 5)), tl.join(_plane(words_RW, x, 3), _plane(words_RW, x, 7))
    )
    return tl.join(even, odd)


@triton.jit
def _halves(packed):
    """Both 16-bit sums of each packed int32, exactly, on a new last axis."""
    low = (packed << 16) >> 16
    return tl.join(low, (packed - low) >> 16)


@triton.jit
def _arrived_last(arrivals_ptr, programs):
    """Whether all `programs` have added their sums; resets the counter for the next launch."""
    tl.debug_barrier()  # every thread's additions come before the program's arrival
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def _features(index_ptr, rows, live, LISTED: tl.constexpr):
    if LISTED:
        return tl.load(index_ptr + rows, mask=live, other=0).to(tl.int64)
    else:
        return rows.to(tl.int64)


@triton.jit
def ternary_gemv_kernel(
    words_ptr,  # int32 [D, W]
    x_ptr,  # int8 [T, R]
    index_ptr,  # int32 [T, R], "listed" only
    x_scale_ptr,  # float32 [T]
    weight_scale_ptr,  # float32 [O]
    y_ptr,  # bf16 [T, O]
    sums_ptr,  # int32 [T, 16 W], zeros before and after
    arrivals_ptr,  # int32 [T, tiles], zeros before and after
    num_rows,  # R: features, or entries of the list
    num_outputs,
    words_per_row,
    rows_per_program,
    FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (tokens, word tiles, splits); a program sums at most TILES * BLOCK_ROWS rows."""
    token, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    words = tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    x_ptr += token * num_rows
    first = split * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    total_WP = tl.zeros([BLOCK_WORDS, 2, 2, 2, 2], tl.int32)
    for step in tl.static_range(TILES):
        rows = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = rows < end
        x_R = tl.load(x_ptr + rows, mask=live, other=0).to(tl.int32)
        feature_R = _features(index_ptr + token * num_rows, rows, live, FEATURES == "listed")
        if FEATURES != "all":
            live = x_R != 0
        words_RW = tl.load(
            words_ptr + feature_R[:, None] * words_per_row + words[None, :],
            mask=live[:, None] & (words < words_per_row)[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x_sum = tl.sum(x_R)  # while the words are on their way
        total_WP += _halves(tl.sum(_packed_products(words_RW, x_R), axis=0)) - x_sum
    _add_and_finish(
        total_WP.reshape([BLOCK_WORDS, 16]), token, tile, words, words_per_row, num_outputs,
        x_scale_ptr, weight_scale_ptr, y_ptr, sums_ptr, arrivals_ptr,
    )  # fmt: skip


@triton.jit
def _add_and_finish(
    total_WP, token, tile, words, words_per_row, num_outputs,
    x_scale_ptr, weight_scale_ptr, y_ptr, sums_ptr, arrivals_ptr,
):  # fmt: skip
    """Add sums [W, 16] (lowest plane bit chooses the half of the word); the last program turns them into outputs."""
    slot = tl.arange(0, 16)
    plane = (slot >> 1) + 8 * (slot & 1)
    output_WP = words[:, None] + plane[None, :] * words_per_row
    inside = (words < words_per_row)[:, None] & (output_WP < num_outputs)
    sums_ptr += token * words_per_row * 16
    tl.atomic_add(sums_ptr + output_WP, total_WP, mask=inside, sem="relaxed")
    if _arrived_last(arrivals_ptr + token * tl.num_programs(1) + tile, tl.num_programs(2)):
        sum_WP = tl.atomic_xchg(sums_ptr + output_WP, tl.zeros_like(total_WP), mask=inside, sem="relaxed")
        scale = tl.load(x_scale_ptr + token) * tl.load(weight_scale_ptr + output_WP, mask=inside, other=0.0)
        y_WP = sum_WP.to(tl.float32) * scale
        tl.store(y_ptr + token * num_outputs + output_WP, y_WP.to(y_ptr.dtype.element_ty), mask=inside)


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
    arrivals_ptr,  # int32 [tiles], zeros before and after
    num_tokens,
    num_features,
    num_outputs,
    words_per_row,
    words_per_program,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (output tiles, splits over words): int8 matrix units, up to 16 tokens, every feature."""
    tile, split = tl.program_id(0), tl.program_id(1)
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
            eviction_policy="evict_first",
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
    total_OT = total_OT >> 6
    output_OT = tokens[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    inside = (tokens < num_tokens)[None, :] & (outputs < num_outputs)[:, None]
    tl.atomic_add(sums_ptr + output_OT, total_OT, mask=inside, sem="relaxed")
    if _arrived_last(arrivals_ptr + tile, tl.num_programs(1)):
        sum_OT = tl.atomic_xchg(sums_ptr + output_OT, tl.zeros_like(total_OT), mask=inside, sem="relaxed")
        x_scale_T = tl.load(x_scale_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        weight_scale_O = tl.load(weight_scale_ptr + outputs, mask=outputs < num_outputs, other=0.0)
        y_OT = sum_OT.to(tl.float32) * (x_scale_T[None, :] * weight_scale_O[:, None])
        tl.store(y_ptr + output_OT, y_OT.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def float_gemv_kernel(
    weight_ptr,  # bf16 [D, O]
    x_ptr,  # bf16 [T, R]
    index_ptr,  # int32 [T, R], "listed" only
    y_ptr,  # bf16 [T, O]
    partial_ptr,  # float32 [T, splits, O]
    arrivals_ptr,  # int32 [T, tiles], zeros before and after
    num_rows,
    num_outputs,
    rows_per_program,
    FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    TILES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (tokens, output tiles, splits); the last program of a tile adds the splits in their order."""
    token, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    outputs = tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inside = outputs < num_outputs
    x_ptr += token * num_rows
    first = split * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)
    total_RO = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for step in tl.static_range(TILES):
        rows = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = rows < end
        x_R = tl.load(x_ptr + rows, mask=live, other=0.0).to(tl.float32)
        feature_R = _features(index_ptr + token * num_rows, rows, live, FEATURES == "listed")
        if FEATURES != "all":
            live = x_R != 0
        weight_RO = tl.load(
            weight_ptr + feature_R[:, None] * num_outputs + outputs[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total_RO += weight_RO.to(tl.float32) * x_R[:, None]
    partial_ptr += token * tl.num_programs(2) * num_outputs
    tl.store(partial_ptr + split.to(tl.int64) * num_outputs + outputs, tl.sum(total_RO, axis=0), mask=inside)
    if _arrived_last(arrivals_ptr + token * tl.num_programs(1) + tile, tl.num_programs(2)):
        y_O = tl.zeros([BLOCK_OUTPUTS], tl.float32)
        for _ in range(loop_bound(tl.num_programs(2), INTERPRET)):
            y_O += tl.load(partial_ptr + outputs, mask=inside, other=0.0, cache_modifier=".cg")
            partial_ptr += num_outputs
        tl.store(y_ptr + token * num_outputs + outputs, y_O.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def compact_kernel(
    x_ptr,  # [T, D]
    index_ptr,  # int32 [T, capacity]
    value_ptr,  # [T, capacity], type of x
    count_ptr,  # int32 [T]
    num_features,
    capacity,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    FILL_TILES: tl.constexpr,
):
    """Grid (tokens,): ordered nonzeros of a row, then zeros up to `capacity`."""
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * num_features
    index_ptr += token * capacity
    value_ptr += token * capacity
    count = 0
    for step in tl.static_range(TILES):
        features = step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + features, mask=features < num_features, other=0.0)
        nonzero = (x.to(tl.float32) != 0).to(tl.int32)  # the interpreter compares bf16 by bits, and -0 is zero
        slot = count + tl.cumsum(nonzero, axis=0) - 1
        keep = (nonzero > 0) & (slot < capacity)
        tl.store(index_ptr + slot, features, mask=keep)
        tl.store(value_ptr + slot, x, mask=keep)
        count += tl.sum(nonzero)
    for step in tl.static_range(FILL_TILES):
        slot = step * BLOCK + tl.arange(0, BLOCK)
        empty = (slot >= count) & (slot < capacity)
        tl.store(index_ptr + slot, tl.zeros_like(slot), mask=empty)
        tl.store(value_ptr + slot, tl.zeros_like(slot).to(value_ptr.dtype.element_ty), mask=empty)
    tl.store(count_ptr + token, count)
