"""Attention of one new token per text over the keys and values kept of its past, which it joins: one launch.

Each program takes every SPLITS-th block of positions of one text and key/value head, up to the token's own position,
which is read on the device: what lies behind costs nothing, and a CUDA graph serves every position.  The program that
arrives last merges what all found, in their order (Flash-Decoding, https://pytorch.org/blog/flash-decoding), so equal
inputs give equal bits; PyTorch's fastest kernel for a masked row (cuDNN's, through scaled_dot_product_attention) does
not, and its others take ten times as long (docs/log.md).

Shapes: b texts, h heads in g groups of r = h / g, d features of a head, M positions.
"""

# mypy: disable-error-code="no-untyped-def"
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_finish import arrived_last
from kernels.launch import INTERPRETED, check_dtype, multiprocessors
from kernels.tile_launch import check_same_device, check_tensor, dot_tiles

BLOCK = 64
"""Positions per step of a program."""
MAX_SPLITS = 16
MAX_FEATURES = 256


@triton.jit
def _attend_kernel(
    query_ptr,  # bf16 [b, h, d]
    key_ptr,  # bf16 [b, g, d]
    value_ptr,  # bf16 [b, g, d]
    keys_ptr,  # bf16 [b, g, M, d]
    values_ptr,  # bf16 [b, g, M, d]
    position_ptr,  # int64 [1]
    y_ptr,  # [b, h, d]
    partial_ptr,  # float32 [b g, SPLITS, ROWS, FEATURES + 2]
    arrivals_ptr,  # int32 [b g], zeros before and after
    query_stride_b,
    query_stride_h,
    key_stride_b,
    key_stride_g,
    value_stride_b,
    value_stride_g,
    num_groups,
    num_positions,
    num_features,
    scale,  # log2(e) / sqrt(d)
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TURNS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Grid (b g, SPLITS)."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text, group = pair // num_groups, pair % num_groups
    position = tl.load(position_ptr).to(tl.int32)
    row_R1, feature_1F = tl.arange(0, ROWS)[:, None], tl.arange(0, FEATURES)[None, :]
    is_feature = feature_1F < num_features
    is_row_RF = (row_R1 < GROUP) & is_feature
    query_ptr += text * query_stride_b + group * GROUP * query_stride_h
    q_RF = tl.load(query_ptr + row_R1 * query_stride_h + feature_1F, mask=is_row_RF, other=0.0)
    k_1F = tl.load(key_ptr + text * key_stride_b + group * key_stride_g + feature_1F, mask=is_feature, other=0.0)
    v_1F = tl.load(value_ptr + text * value_stride_b + group * value_stride_g + feature_1F, mask=is_feature, other=0.0)
    keys_ptr += pair * num_positions * num_features
    values_ptr += pair * num_positions * num_features
    if (position // BLOCK) % SPLITS == split:
        tl.store(keys_ptr + position * num_features + feature_1F, k_1F, mask=is_feature)
        tl.store(values_ptr + position * num_features + feature_1F, v_1F, mask=is_feature)

    largest_R = tl.full([ROWS], float("-inf"), tl.float32)
    total_R = tl.zeros([ROWS], tl.float32)
    sum_RF = tl.zeros([ROWS, FEATURES], tl.float32)
    for turn in tl.range(TURNS, num_stages=1):
        start = (turn * SPLITS + split) * BLOCK
        if start <= position:
            at_B1 = start + tl.arange(0, BLOCK)[:, None]
            at_BF = at_B1 * num_features + feature_1F
            is_past = (at_B1 < position) & is_feature
            # The new token comes from its registers: its stores may still be on their way.
            k_BF = tl.where(at_B1 == position, k_1F, tl.load(keys_ptr + at_BF, mask=is_past, other=0.0))
            v_BF = tl.where(at_B1 == position, v_1F, tl.load(values_ptr + at_BF, mask=is_past, other=0.0))
            scores_RB = dot_tiles(q_RF, tl.trans(k_BF), tl.zeros([ROWS, BLOCK], tl.float32), INTERPRET) * scale
            scores_RB = tl.where(tl.trans(at_B1) <= position, scores_RB, float("-inf"))
            before_R = largest_R
            largest_R = tl.maximum(before_R, tl.max(scores_RB, axis=1))
            weights_RB = tl.exp2(scores_RB - largest_R[:, None])
            decay_R = tl.exp2(before_R - largest_R)
            total_R = total_R * decay_R + tl.sum(weights_RB, axis=1)
            sum_RF = dot_tiles(weights_RB.to(v_BF.dtype), v_BF, sum_RF * decay_R[:, None], INTERPRET)

    size: tl.constexpr = ROWS * (FEATURES + 2)
    partial_ptr += pair * SPLITS * size
    at_RF = row_R1 * FEATURES + feature_1F
    at_R = ROWS * FEATURES + tl.arange(0, ROWS)
    tl.store(partial_ptr + split * size + at_RF, sum_RF, mask=is_row_RF)
    tl.store(partial_ptr + split * size + at_R, largest_R)
    tl.store(partial_ptr + split * size + at_R + ROWS, total_R)
    if arrived_last(arrivals_ptr + pair, SPLITS):
        split_S1 = tl.arange(0, SPLITS)[:, None]
        largest_SR = tl.load(partial_ptr + split_S1 * size + at_R[None, :], cache_modifier=".cg")
        total_SR = tl.load(partial_ptr + split_S1 * size + at_R[None, :] + ROWS, cache_modifier=".cg")
        largest_R = tl.max(largest_SR, axis=0)
        total_R = tl.sum(total_SR * tl.exp2(largest_SR - largest_R[None, :]), axis=0)
        y_RF = tl.zeros([ROWS, FEATURES], tl.float32)
        for number in tl.static_range(SPLITS):
            one_R = tl.load(partial_ptr + number * size + at_R, cache_modifier=".cg")
            one_RF = tl.load(partial_ptr + number * size + at_RF, mask=is_row_RF, other=0.0, cache_modifier=".cg")
            y_RF += one_RF * tl.exp2(one_R - largest_R)[:, None]
        y_RF /= total_R[:, None]
        at_y_RF = (pair * GROUP + row_R1) * num_features + feature_1F
        tl.store(y_ptr + at_y_RF, y_RF.to(y_ptr.dtype.element_ty), mask=is_row_RF)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    arrivals: Tensor,
    splits: int | None = None,
) -> Tensor:
    """softmax(q K^T / sqrt(d)) V over positions 0 to `position`, whose key and value join the memory.

    Args:
        query: bf16 [b, h, d], heads of a group side by side; features contiguous, as of `key` and `value`.
        key: bf16 [b, g, d].
        value: bf16 [b, g, d].
        keys: bf16 [b, g, M, d], written at `position`.
        values: likewise.
        position: int64 [1] on the device, below M.
        arrivals: int32 of at least b g zeros, which it leaves.
        splits: programs per text and group, a power of two; None: two per multiprocessor in all.

    Returns:
        bf16 [b, h, d], the same bits on every run.

    Raises:
        ValueError: an argument of a wrong type, shape, layout or device, or more than 256 features.
    """
    texts, groups, positions, features = _check_memory(keys, values)
    heads = query.shape[1] if query.dim() == 3 else 0
    if not heads or heads % groups:
        raise ValueError(f"query: shape {list(query.shape)}, expected a multiple of {groups} heads in the middle")
    for name, one, count in (("query", query, heads), ("key", key, groups), ("value", value, groups)):
        check_dtype(one, name, (torch.bfloat16,))
        if one.shape != (texts, count, features) or one.stride(-1) != 1:
            found = f"shape {list(one.shape)}, strides {one.stride()}"
            raise ValueError(f"{name}: {found}; expected [{texts}, {count}, {features}] with contiguous features")
    check_tensor("position", position, dtype=torch.int64, shape=(1,))
    check_tensor("arrivals", arrivals, dtype=torch.int32, shape=(None,))
    if arrivals.numel() < texts * groups:
        raise ValueError(f"arrivals has {arrivals.numel()} entries, expected at least {texts * groups}")
    check_same_device(query=query, key=key, value=value, keys=keys, values=values, position=position, arrivals=arrivals)
    blocks = triton.cdiv(positions, BLOCK)
    if splits is None:
        filling = triton.next_power_of_2(max(1, 2 * multiprocessors(keys.device) // (texts * groups)))
        splits = min(MAX_SPLITS, filling, triton.next_power_of_2(blocks))
    rows = max(16, triton.next_power_of_2(heads // groups))
    width = max(16, triton.next_power_of_2(features))
    partial = torch.empty(texts * groups, splits, rows, width + 2, dtype=torch.float32, device=keys.device)
    y = torch.empty(texts, heads, features, dtype=torch.float32 if INTERPRETED else torch.bfloat16, device=keys.device)
    _attend_kernel[(texts * groups, splits)](
        query, key, value, keys, values, position, y, partial, arrivals,
        *(stride for one in (query, key, value) for stride in one.stride()[:2]),
        groups, positions, features, math.log2(math.e) / math.sqrt(features),
        GROUP=heads // groups, ROWS=rows, FEATURES=width, BLOCK=BLOCK, SPLITS=splits,
        TURNS=triton.cdiv(blocks, splits), INTERPRET=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return y.to(torch.bfloat16)


def _check_memory(keys: Tensor, values: Tensor) -> torch.Size:
    check_tensor("keys", keys, dtype=torch.bfloat16, shape=(None, None, None, None))
    check_tensor("values", values, dtype=torch.bfloat16, shape=tuple(keys.shape))
    if keys.shape[-1] > MAX_FEATURES:
        raise ValueError(f"keys: {keys.shape[-1]} features of a head, expected at most {MAX_FEATURES}")
    return keys.shape
