"""Products of one to sixteen tokens with a big weight: time is the bytes of weight that travel, so fewer travel.

Three products, each one launch without synchronization, usable inside a CUDA graph:

    ternary_gemv     y = x_scale weight_scale (q t^T), 2-bit column layout; skips weights of zero activations
    ternary_dot      the same for batches, 2-bit row layout, on the matrix units; skips nothing
    float_gemv       y = W[:, nonzero] x[nonzero], bf16 W^T [D, O] (TEAL's case, arXiv 2408.14690 sec. 4.2)

The ternary results equal `reference.linear` bit for bit: integers are summed exactly, in any order, then scaled and
rounded once.  `float_gemv` sums float32 in a fixed order: equal inputs give equal bits on every run.

The two gemv read the activations themselves and load no weights for zeros.  The obvious way, a list of the nonzeros,
costs a launch of its own, and more time than the arithmetic on zeros that it saves.

Each token has its own mask and its own programs; tokens share weights through the second-level cache, so device memory
serves the union of their masks.  The alternative, one program for all tokens, must do arithmetic on that union.

A product is over in microseconds, so launches count.  With `overlap` its programs start while the previous kernel of
the stream is still ending, and wait inside (programmatic dependent launch, Hopper and later).

Shapes: T tokens, D input features, O output features, W packed words per row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from kernels.decode_dot import ternary_dot_kernel
from kernels.decode_gemv import float_gemv_kernel, ternary_gemv_kernel
from kernels.launch import INTERPRETED, multiprocessors
from kernels.packing import PackedTernary, check_packed
from kernels.tile_launch import check_same_device, check_tensor

MAX_TOKENS = 16
MAX_FEATURES = 2**17 - 1
"""float32 holds the exact sum of fewer than 2^17 products, which the reference relies on, too."""
TERNARY_STEPS = 32
"""Groups of four features whose words a thread holds at once: 128 of its 255 registers."""
FLOAT_STEPS = 14
FLOAT_REGISTERS = 128
MAX_STEPS = 2 * TERNARY_STEPS
"""Of any configuration: they are unrolled, and what no longer fits the registers takes the compiler minutes."""


@dataclass(frozen=True)
class GemvConfig:
    """How `ternary_gemv` and `float_gemv` divide the features; none of it changes a ternary result.

    Attributes:
        splits: programs that share a tile of 512 (ternary) or 256 (float) outputs of a token.
        num_warps: warps per program, a power of two.
        chunks: turns in which a warp takes its features; the weights of a turn are on their way at once.
        overlap: start while the previous kernel of the stream ends.
    """

    splits: int = 1
    num_warps: int = 4
    chunks: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        _check_powers_of_two(self, "num_warps")
        for name in ("splits", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")

    def steps(self, num_rows: int) -> int:
        """Rows (ternary: groups of four features) per warp and turn.

        Raises:
            ValueError: these are more than a warp can hold.
        """
        steps = triton.cdiv(num_rows, self.splits * self.num_warps * self.chunks)
        if steps > MAX_STEPS:
            raise ValueError(f"{self}: {steps} rows per warp and turn, expected at most {MAX_STEPS}: raise chunks")
        return steps

    @staticmethod
    def filling(programs: int, num_rows: int, *, num_warps: int, most_steps: int) -> "GemvConfig":
        """About `programs` per tile, in as few turns as `most_steps` rows at once allow."""
        splits = min(max(1, programs), triton.cdiv(num_rows, num_warps))
        chunks = triton.cdiv(num_rows, splits * num_warps * most_steps)
        return GemvConfig(splits, num_warps, chunks)


@dataclass(frozen=True)
class DotConfig:
    """Shape of one program's work in `ternary_dot`.

    Attributes:
        block_outputs: outputs per program, a power of two from 16; from 64 on Hopper's warpgroup instructions apply.
        block_words: int32 words (16 features each) per step, a power of two from 8.
        splits: programs that share the features of one tile of outputs.
        num_warps: warps per program.
        num_stages: steps whose weights are on their way at once.
        overlap: start while the previous kernel of the stream ends.
    """

    block_outputs: int = 64
    block_words: int = 32
    splits: int = 4
    num_warps: int = 4
    num_stages: int = 4
    overlap: bool = False

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


def ternary_gemv(
    x_TD: Tensor,
    weight: PackedTernary,
    *,
    x_scale_T1: Tensor,
    weight_scale_O: Tensor,
    config: GemvConfig | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x_scale weight_scale (x weight^T) for one or a few tokens, skipping the weights of zero activations.

    Args:
        x_TD: int8 codes [T, D].  A D that is no multiple of four costs a padded copy.
        weight: ternary weight [O, D] in the column layout.
        x_scale_T1: float32 [T, 1].
        weight_scale_O: float32 [O].
        config: division of the work; None for `gemv_config`.
        workspace: see `Workspace`; None allocates one for this call.
        out: bf16 [T, O] to write to; None allocates it.

    Returns:
        bf16 [T, O], equal to `reference.linear` bit for bit.

    Raises:
        ValueError: an argument of a wrong type, shape, layout or device, more than 16 tokens, too small a workspace,
            or more splits than a sum can count.
    """
    check_packed("weight", weight, "column")
    num_tokens = _check_activations(x_TD, torch.int8, weight.in_features)
    out_features = weight.out_features
    _check_scales(x_scale_T1, weight_scale_O, num_tokens, out_features)
    out = _output(out, num_tokens, out_features, x_TD.device)
    workspace = _workspace(workspace, x_TD.device, num_sums=num_tokens * out_features)
    check_same_device(
        x_TD=x_TD, weight=weight.words, x_scale_T1=x_scale_T1, weight_scale_O=weight_scale_O,
        workspace=workspace.sums, out=out,
    )  # fmt: skip
    groups_TG = _groups_of_four(x_TD)
    num_groups = groups_TG.shape[1]
    config = config or gemv_config(weight, num_tokens)
    stored = _stored(out)
    ternary_gemv_kernel[(triton.cdiv(weight.words_per_row, 32), config.splits, num_tokens)](
        weight.words, groups_TG, x_scale_T1, weight_scale_O, stored, workspace.sums,
        num_groups, out_features, _count_shift(weight.in_features, config.splits),
        WORDS_PER_ROW=weight.words_per_row, STEPS=config.steps(num_groups), CHUNKS=config.chunks,
        WARPS=config.num_warps, INTERPRET=INTERPRETED, num_warps=config.num_warps,
        **_overlap_options(config, x_TD.device),
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
    num_tokens = _check_activations(x_TD, torch.int8, weight.in_features)
    _check_scales(x_scale_T1, weight_scale_O, num_tokens, weight.out_features)
    config = config or DotConfig()
    out = _output(out, num_tokens, weight.out_features, x_TD.device)
    tiles = triton.cdiv(weight.out_features, config.block_outputs)
    steps = triton.cdiv(weight.words_per_row, config.block_words)
    words_per_program = triton.cdiv(steps, config.splits) * config.block_words
    splits = triton.cdiv(weight.words_per_row, words_per_program)
    workspace = _workspace(workspace, x_TD.device, num_sums=num_tokens * weight.out_features)
    check_same_device(
        x_TD=x_TD, weight=weight.words, x_scale_T1=x_scale_T1, weight_scale_O=weight_scale_O,
        workspace=workspace.sums, out=out,
    )  # fmt: skip
    stored = _stored(out)
    ternary_dot_kernel[(tiles, splits)](
        weight.words, x_TD, x_scale_T1, weight_scale_O, stored, workspace.sums,
        num_tokens, weight.in_features, weight.out_features, weight.words_per_row, words_per_program,
        _count_shift(weight.in_features, splits),
        BLOCK_OUTPUTS=config.block_outputs, BLOCK_WORDS=config.block_words, STAGES=config.num_stages,
        INTERPRET=INTERPRETED, num_warps=config.num_warps, **_overlap_options(config, x_TD.device),
    )  # fmt: skip
    return _finished(stored, out)


def float_gemv(
    x_TD: Tensor,
    weight_DO: Tensor,
    *,
    config: GemvConfig | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T for one or a few tokens of bf16 activations, skipping the weights of zeros, summed in float32.

    Args:
        x_TD: bf16 activations [T, D].
        weight_DO: bf16 W^T [D, O]: an input feature's weights for all outputs are contiguous.
        config: division of the work; None for `float_gemv_config`.
        workspace: as in `ternary_gemv`; only its `arrivals` are used.
        out: bf16 [T, O] to write to; None allocates it.

    Returns:
        bf16 [T, O], the same bits on every run with the same configuration.

    Raises:
        ValueError: as `ternary_gemv`.
    """
    check_tensor("weight_DO", weight_DO, dtype=torch.bfloat16, shape=(None, None))
    in_features, out_features = weight_DO.shape
    num_tokens = _check_activations(x_TD, torch.bfloat16, in_features)
    config = config or float_gemv_config(weight_DO, num_tokens)
    out = _output(out, num_tokens, out_features, x_TD.device)
    tiles = triton.cdiv(out_features, 256)
    partial = torch.empty(num_tokens, config.splits, out_features, dtype=torch.float32, device=x_TD.device)
    workspace = _workspace(workspace, x_TD.device, num_arrivals=num_tokens * tiles)
    check_same_device(x_TD=x_TD, weight_DO=weight_DO, workspace=workspace.arrivals, out=out)
    stored = _stored(out)
    # The limit also tells the assembler that fewer registers are no gain; else it delays loads to save some.
    registers = {} if INTERPRETED else {"maxnreg": FLOAT_REGISTERS}
    float_gemv_kernel[(tiles, config.splits, num_tokens)](
        weight_DO, x_TD, stored, partial, workspace.arrivals, in_features,
        NUM_OUTPUTS=out_features, STEPS=config.steps(in_features), CHUNKS=config.chunks, WARPS=config.num_warps,
        SPLITS=config.splits, num_warps=config.num_warps, **registers, **_overlap_options(config, x_TD.device),
    )  # fmt: skip
    return _finished(stored, out)


def gemv_config(weight: PackedTernary, num_tokens: int) -> GemvConfig:
    """Default for `ternary_gemv`: two programs per multiprocessor, in one turn at batch 1 of usual sizes."""
    programs = 2 * multiprocessors(weight.words.device) // (triton.cdiv(weight.words_per_row, 32) * num_tokens)
    return GemvConfig.filling(programs, triton.cdiv(weight.in_features, 4), num_warps=8, most_steps=TERNARY_STEPS)


def float_gemv_config(weight_DO: Tensor, num_tokens: int) -> GemvConfig:
    """Default for `float_gemv`: four programs per multiprocessor, which FLOAT_REGISTERS admit."""
    in_features, out_features = weight_DO.shape
    programs = 4 * multiprocessors(weight_DO.device) // (triton.cdiv(out_features, 256) * num_tokens)
    return GemvConfig.filling(programs, in_features, num_warps=4, most_steps=FLOAT_STEPS)


def _check_activations(x_TD: Tensor, dtype: torch.dtype, in_features: int) -> int:
    """Number of tokens."""
    check_tensor("x_TD", x_TD, dtype=dtype, shape=(None, in_features))
    _check_range("tokens of x_TD", x_TD.shape[0], 1, MAX_TOKENS)
    _check_range("features of the weight", in_features, 1, MAX_FEATURES)
    return x_TD.shape[0]


def _groups_of_four(x_TD: Tensor) -> Tensor:
    """int32 [T, D / 4]: four codes in the bytes of a word, zeros behind the last; a view where the memory allows it."""
    if x_TD.shape[1] % 4 or x_TD.data_ptr() % 4:
        x_TD = pad(x_TD, (0, -x_TD.shape[1] % 4)).clone()
    return x_TD.view(torch.int32)


def _count_shift(in_features: int, splits: int) -> int:
    """The bits of a sum below its count of arrivals: 2^shift is more than twice any sum of codes, 128 D."""
    shift = (2 * 128 * in_features).bit_length()
    most = 2 ** (31 - shift) - 1
    if splits > most:
        raise ValueError(f"config.splits={splits}: expected at most {most} for {in_features} features")
    return shift


def _overlap_options(config: GemvConfig | DotConfig, device: torch.device) -> dict[str, Any]:
    overlap = config.overlap and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


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


def _workspace(
    workspace: Workspace | None, device: torch.device, *, num_sums: int = 0, num_arrivals: int = 0
) -> Workspace:
    if workspace is None:
        return Workspace.allocate(device, num_sums=num_sums, num_arrivals=num_arrivals)
    for name, memory, least in (("sums", workspace.sums, num_sums), ("arrivals", workspace.arrivals, num_arrivals)):
        check_tensor(f"workspace.{name}", memory, dtype=torch.int32, shape=(None,))
        if memory.numel() < least:
            raise ValueError(f"workspace.{name}: {memory.numel()} entries, expected at least {least}")
    return workspace
