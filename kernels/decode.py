"""Products of one to sixteen tokens with a big weight: time is the bytes of weight that travel, so fewer travel.

Three products, each one launch without synchronization, usable inside a CUDA graph:

    ternary_gemv     y = x_scale weight_scale (q t^T), 2-bit column layout; skips weights of zero activations
    ternary_dot      the same for batches, 2-bit row layout, on the matrix units; skips nothing
    float_gemv       y = W[:, nonzero] x[nonzero], bf16 W^T [D, O] (TEAL's case, arXiv 2408.14690 sec. 4.2)

The ternary results equal `reference.linear` bit for bit: integers are summed exactly, in any order, then scaled and
rounded once.  `float_gemv` sums float32 in a fixed order: equal inputs give equal bits on every run.

Zeros are skipped in two ways.  `features="nonzero"` reads the activations themselves and loads no weights for zeros, at
the price of arithmetic on them.  `compact_nonzero` lists the nonzeros first, which costs a launch (or an epilogue of
whatever produced the activations) and saves that arithmetic.  The list has a fixed capacity, top-K's K, so its length
never travels to the host.

Each token has its own mask and its own programs; tokens share weights through the second-level cache, so device memory
serves the union of their masks.  The obvious alternative, one program for all tokens, must do arithmetic on that union.

Shapes: T tokens, D input features, O output features, K capacity of a list of nonzeros, W packed words per row.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from kernels.decode_triton import (
    PACKED_ROWS,
    compact_kernel,
    float_gemv_kernel,
    ternary_dot_kernel,
    ternary_gemv_kernel,
)
from kernels.launch import INTERPRETED
from kernels.packing import CODES_PER_WORD, PackedTernary, check_packed
from kernels.tile_launch import check_same_device, check_tensor

Features = Literal["all", "nonzero", "listed"]
MAX_TOKENS = 16
MAX_FEATURES = 2**17 - 1
"""float32 holds the exact sum of fewer than 2^17 products, which the reference relies on, too."""
COMPACT_BLOCK = 16384


@dataclass(frozen=True)
class GemvConfig:
    """Shape of one program's work in `ternary_gemv` and `float_gemv`; none of it changes a ternary result.

    Attributes:
        block_rows: features whose weights are loaded at once, a power of two (ternary: at most 128).
        block_columns: int32 words (ternary: 16 outputs each) or outputs (float) per program, a power of two.
        tiles: consecutive blocks of rows that one program sums.
        rows: features per program, at most block_rows * tiles; 0 for exactly that.  Fewer even out the last wave.
        num_warps: warps per program.
    """

    block_rows: int = 64
    block_columns: int = 128
    tiles: int = 1
    rows: int = 0
    num_warps: int = 4

    def __post_init__(self) -> None:
        _check_powers_of_two(self, "block_rows", "block_columns", "num_warps")
        if self.tiles < 1:
            raise ValueError(f"tiles={self.tiles}: expected at least 1")
        if not 0 <= self.rows <= self.block_rows * self.tiles:
            held = self.block_rows * self.tiles
            raise ValueError(f"rows={self.rows}: expected 0 to block_rows * tiles = {held}, what a program holds")

    @property
    def rows_per_program(self) -> int:
        """Features that one program sums."""
        return self.rows or self.block_rows * self.tiles


@dataclass(frozen=True)
class DotConfig:
    """Shape of one program's work in `ternary_dot`.

    Attributes:
        block_outputs: outputs per program, a power of two from 16; from 64 on Hopper's warpgroup instructions apply.
        block_words: int32 words (16 features each) per step, a power of two from 8.
        splits: programs that share the features of one tile of outputs.
        num_warps: warps per program.
        num_stages: steps whose weights are on their way at once.
    """

    block_outputs: int = 64
    block_words: int = 64
    splits: int = 4
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        _check_powers_of_two(self, "block_outputs", "block_words", "num_warps")
        for name, least in (("block_outputs", 16), ("block_words", 8), ("splits", 1), ("num_stages", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")


def _check_powers_of_two(config: GemvConfig | DotConfig, *names: str) -> None:
    for name in names:
        size = getattr(config, name)
        if size < 1 or size & (size - 1):
            raise ValueError(f"{name}={size}: expected a power of two")


@dataclass(frozen=True)
class ActiveFeatures:
    """Nonzero activations of each token in the order of their features, padded with feature 0 and value 0.

    Attributes:
        indices: int32 [T, K].
        values: [T, K] in the type of the activations.
        counts: int32 [T], nonzeros found; more than K means that the list is incomplete.
    """

    indices: Tensor
    values: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Workspace:
    """Memory between the programs of a launch.  Every launch expects zeros in `sums` and `arrivals` and leaves zeros.

    Launches on one stream share a workspace; concurrent streams need one each.  After a launch that was killed midway,
    make a new one.
    """

    sums: Tensor
    arrivals: Tensor

    @staticmethod
    def allocate(device: torch.device | str, *, num_sums: int, num_arrivals: int) -> "Workspace":
        """A workspace of at least these sizes; one that fits the largest product serves every smaller one."""
        memory = torch.zeros(num_sums + num_arrivals, dtype=torch.int32, device=device)
        return Workspace(memory[:num_sums], memory[num_sums:])


def compact_nonzero(x_TD: Tensor, capacity: int) -> ActiveFeatures:
    """List the nonzeros of each row, one program per token.

    Args:
        x_TD: int8 codes or bf16 activations [T, D].
        capacity: K, the most nonzeros that a row can have; int((1 - sparsity) D) after top-K.

    Raises:
        ValueError: wrong type or shape, or a capacity outside 1..D.
    """
    check_tensor("x_TD", x_TD, dtype=(torch.int8, torch.bfloat16), shape=(None, None))
    num_tokens, num_features = x_TD.shape
    _check_range("x_TD tokens", num_tokens, 1, 65535)
    _check_range("x_TD features", num_features, 1, MAX_FEATURES)
    _check_range("capacity", capacity, 1, num_features)
    check_same_device(x_TD=x_TD)
    indices = torch.empty(num_tokens, capacity, dtype=torch.int32, device=x_TD.device)
    values = torch.empty(num_tokens, capacity, dtype=x_TD.dtype, device=x_TD.device)
    counts = torch.empty(num_tokens, dtype=torch.int32, device=x_TD.device)
    block = min(COMPACT_BLOCK, max(128, triton.next_power_of_2(num_features)))
    compact_kernel[(num_tokens,)](
        x_TD, indices, values, counts, num_features, capacity,
        BLOCK=block, TILES=triton.cdiv(num_features, block), FILL_TILES=triton.cdiv(capacity, block),
        num_warps=max(1, min(32, block // 512)),
    )  # fmt: skip
    return ActiveFeatures(indices, values, counts)


def ternary_gemv(
    x: Tensor | ActiveFeatures,
    weight: PackedTernary,
    *,
    x_scale_T1: Tensor,
    weight_scale_O: Tensor,
    features: Literal["all", "nonzero"] = "nonzero",
    config: GemvConfig | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x_scale weight_scale (x weight^T) for one or a few tokens, skipping the weights of zero activations.

    Args:
        x: int8 codes [T, D], or their nonzeros from `compact_nonzero`.
        weight: ternary weight [O, D] in the column layout.
        x_scale_T1: float32 [T, 1].
        weight_scale_O: float32 [O].
        features: what to do with codes given whole: "nonzero" skips zeros, "all" is for dense activations.
        config: shape of a program's work; None for `gemv_config`.
        workspace: see `Workspace`; None allocates one for this call.
        out: bf16 [T, O] to write to; None allocates it.

    Returns:
        bf16 [T, O], equal to `reference.linear` bit for bit.

    Raises:
        ValueError: an argument of a wrong type, shape, layout or device, more than 16 tokens, too small a workspace.
    """
    check_packed("weight", weight, "column")
    rows, indices, mode = _operand(x, torch.int8, weight.in_features, features)
    num_tokens, num_rows = rows.shape
    _check_scales(x_scale_T1, weight_scale_O, num_tokens, weight.out_features)
    config = config or gemv_config(num_rows, weight.out_features, num_tokens)
    if config.block_rows > PACKED_ROWS:
        raise ValueError(f"config.block_rows={config.block_rows}: expected at most {PACKED_ROWS}, exact in 16 bits")
    out = _output(out, num_tokens, weight.out_features, rows.device)
    tiles = triton.cdiv(weight.words_per_row, config.block_columns)
    splits = triton.cdiv(num_rows, config.rows_per_program)
    workspace = _workspace(
        workspace, rows.device, num_tokens * weight.words_per_row * CODES_PER_WORD, num_tokens * tiles
    )
    check_same_device(
        x=rows, indices=indices, weight=weight.words, x_scale_T1=x_scale_T1, weight_scale_O=weight_scale_O,
        workspace=workspace.sums, out=out,
    )  # fmt: skip
    stored = _stored(out)
    ternary_gemv_kernel[(num_tokens, tiles, splits)](
        weight.words, rows, indices, x_scale_T1, weight_scale_O, stored, workspace.sums, workspace.arrivals,
        num_rows, weight.out_features, weight.words_per_row, config.rows_per_program,
        FEATURES=mode, BLOCK_ROWS=config.block_rows, BLOCK_WORDS=config.block_columns, TILES=config.tiles,
        num_warps=config.num_warps,
    )  # fmt: skip
    return _finished(stored, out)


def ternary_dot(
    x_TD: Tensor,
    weight: PackedTernary,
    *,
    x_scale_T1: Tensor,
    weight_scale_O: Tensor,
    config: DotConfig | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x_scale weight_scale (x weight^T) for up to 16 tokens on the matrix units, zeros included.

    Args:
        x_TD: int8 codes [T, D].
        weight: ternary weight [O, D] in the row layout.
        x_scale_T1: float32 [T, 1].
        weight_scale_O: float32 [O].
        config: shape of a program's work; None for the default.
        workspace: see `Workspace`; None allocates one for this call.
        out: bf16 [T, O] to write to; None allocates it.

    Returns:
        bf16 [T, O], equal to `reference.linear` bit for bit.

    Raises:
        ValueError: as `ternary_gemv`.
    """
    check_packed("weight", weight, "row")
    x_TD, _, _ = _operand(x_TD, torch.int8, weight.in_features, "all")
    num_tokens, num_features = x_TD.shape
    _check_scales(x_scale_T1, weight_scale_O, num_tokens, weight.out_features)
    config = config or DotConfig()
    out = _output(out, num_tokens, weight.out_features, x_TD.device)
    tiles = triton.cdiv(weight.out_features, config.block_outputs)
    steps = triton.cdiv(weight.words_per_row, config.block_words)
    words_per_program = triton.cdiv(steps, config.splits) * config.block_words
    splits = triton.cdiv(weight.words_per_row, words_per_program)
    workspace = _workspace(workspace, x_TD.device, num_tokens * weight.out_features, tiles)
    check_same_device(
        x_TD=x_TD, weight=weight.words, x_scale_T1=x_scale_T1, weight_scale_O=weight_scale_O,
        workspace=workspace.sums, out=out,
    )  # fmt: skip
    stored = _stored(out)
    ternary_dot_kernel[(tiles, splits)](
        weight.words, x_TD, x_scale_T1, weight_scale_O, stored, workspace.sums, workspace.arrivals,
        num_tokens, num_features, weight.out_features, weight.words_per_row, words_per_program,
        BLOCK_OUTPUTS=config.block_outputs, BLOCK_WORDS=config.block_words, STAGES=config.num_stages,
        INTERPRET=INTERPRETED, num_warps=config.num_warps,
    )  # fmt: skip
    return _finished(stored, out)


def float_gemv(
    x: Tensor | ActiveFeatures,
    weight_DO: Tensor,
    *,
    features: Literal["all", "nonzero"] = "nonzero",
    config: GemvConfig | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T for one or a few tokens of bf16 activations, skipping the weights of zeros, summed in float32.

    Args:
        x: bf16 activations [T, D], or their nonzeros from `compact_nonzero`.
        weight_DO: bf16 W^T [D, O]: an input feature's weights for all outputs are contiguous.
        features: as in `ternary_gemv`.
        config: shape of a program's work; None for `float_gemv_config`.
        workspace: as in `ternary_gemv`; only its `arrivals` are used.
        out: bf16 [T, O] to write to; None allocates it.

    Returns:
        bf16 [T, O], the same bits on every run with the same configuration.

    Raises:
        ValueError: as `ternary_gemv`.
    """
    check_tensor("weight_DO", weight_DO, dtype=torch.bfloat16, shape=(None, None))
    in_features, out_features = weight_DO.shape
    rows, indices, mode = _operand(x, torch.bfloat16, in_features, features)
    num_tokens, num_rows = rows.shape
    config = config or float_gemv_config(num_rows, out_features, num_tokens)
    out = _output(out, num_tokens, out_features, rows.device)
    tiles = triton.cdiv(out_features, config.block_columns)
    splits = triton.cdiv(num_rows, config.rows_per_program)
    partial = torch.empty(num_tokens, splits, out_features, dtype=torch.float32, device=rows.device)
    workspace = _workspace(workspace, rows.device, 0, num_tokens * tiles)
    check_same_device(x=rows, indices=indices, weight_DO=weight_DO, workspace=workspace.arrivals, out=out)
    stored = _stored(out)
    float_gemv_kernel[(num_tokens, tiles, splits)](
        weight_DO, rows, indices, stored, partial, workspace.arrivals,
        num_rows, out_features, config.rows_per_program,
        FEATURES=mode, BLOCK_ROWS=config.block_rows, BLOCK_OUTPUTS=config.block_columns, TILES=config.tiles,
        INTERPRET=INTERPRETED, num_warps=config.num_warps,
    )  # fmt: skip
    return _finished(stored, out)


def gemv_config(num_rows: int, out_features: int, num_tokens: int) -> GemvConfig:
    """Default shape for `ternary_gemv`: 16 loads of 16 bytes per thread, 128 features per program in large products."""
    words = triton.cdiv(out_features, CODES_PER_WORD)
    columns = min(128, max(16, triton.next_power_of_2(words)))
    config = GemvConfig(block_rows=64, block_columns=columns)
    if num_tokens * triton.cdiv(words, columns) * triton.cdiv(num_rows, 64) > 1024:
        # Two tiles of 128 words would not fit the registers.
        config = replace(config, block_columns=min(64, columns), tiles=2)
    return config


def float_gemv_config(num_rows: int, out_features: int, num_tokens: int) -> GemvConfig:
    """Default shape for `float_gemv`: several hundred programs of 16-byte loads."""
    columns = min(512, max(64, triton.next_power_of_2(out_features)))
    programs = triton.cdiv(out_features, columns) * num_tokens
    tiles = max(1, min(8, num_rows * programs // (16 * 528)))
    return GemvConfig(block_rows=16, block_columns=columns, tiles=tiles)


def _operand(
    x: Tensor | ActiveFeatures, dtype: torch.dtype, in_features: int, features: str
) -> tuple[Tensor, Tensor, Features]:
    """Values [T, R], indices (the values again where there are none), and the kernel's feature mode."""
    if features not in ("all", "nonzero"):
        raise ValueError(f"features: {features!r}, expected 'all' or 'nonzero'; pass ActiveFeatures for a list")
    if isinstance(x, ActiveFeatures):
        check_tensor("x.values", x.values, dtype=dtype, shape=(None, None))
        check_tensor("x.indices", x.indices, dtype=torch.int32, shape=tuple(x.values.shape))
        _check_range("x.values capacity", x.values.shape[1], 1, in_features)
        values, indices, mode = x.values, x.indices, "listed"
    else:
        check_tensor("x", x, dtype=dtype, shape=(None, in_features))
        values, indices, mode = x, x, features
    _check_range("tokens of x", values.shape[0], 1, MAX_TOKENS)
    _check_range("features of the weight", in_features, 1, MAX_FEATURES)
    return values, indices, mode  # type: ignore[return-value]  # one of three literals


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: {value}, expected {least} to {most}")


def _check_scales(x_scale_T1: Tensor, weight_scale_O: Tensor, num_tokens: int, out_features: int) -> None:
    check_tensor("x_scale_T1", x_scale_T1, dtype=torch.float32, shape=(num_tokens, 1))
    check_tensor("weight_scale_O", weight_scale_O, dtype=torch.float32, shape=(out_features,))


def _output(out: Tensor | None, num_tokens: int, out_features: int, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(num_tokens, out_features, dtype=torch.bfloat16, device=device)
    check_tensor("out", out, dtype=torch.bfloat16, shape=(num_tokens, out_features))
    return out


def _stored(out: Tensor) -> Tensor:
    """What the kernel writes: `out`; under the interpreter float32 instead, since it cuts off bits to make bf16."""
    return torch.empty_like(out, dtype=torch.float32) if INTERPRETED else out


def _finished(stored: Tensor, out: Tensor) -> Tensor:
    return out.copy_(stored) if INTERPRETED else out


def _workspace(workspace: Workspace | None, device: torch.device, num_sums: int, num_arrivals: int) -> Workspace:
    if workspace is None:
        return Workspace.allocate(device, num_sums=num_sums, num_arrivals=num_arrivals)
    for name, memory, least in (("sums", workspace.sums, num_sums), ("arrivals", workspace.arrivals, num_arrivals)):
        check_tensor(f"workspace.{name}", memory, dtype=torch.int32, shape=(None,))
        if memory.numel() < least:
            raise ValueError(f"workspace.{name}: {memory.numel()} entries, expected at least {least}")
    return workspace
