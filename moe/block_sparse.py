"""Experts in bf16 as block-sparse products, after MegaBlocks (arXiv 2211.15841 sec. 4 and 5).

The hidden layer of all experts is one matrix, [tokens, experts x width].  A token meets its own expert, so this matrix
is zero but for a block per expert, and with each expert's tokens padded to whole tiles it is sparse by tiles:

    forward     H = X W_up^T     at the tiles: sdd         A = activation(H)       Y = A W_down^T           dsd
    backward    dA = dY W_down   at the tiles: sdd         dH = activation'(dA)    dX = dH W_up             dsd
                dW_down = dY^T A                    dds                            dW_up = dH^T X           dsd, S^T

Every product is one launch, whatever the token counts, and nothing waits for the GPU.  Quantized experts run on grouped
products instead (`moe.grouped`): top-K and SubLN look at a token's whole hidden row, which tiles do not keep together.

In memory the tiles of a row of tiles lie one after the other, first all of gate, then all of up, so an activation
function runs over them as over a row [gate | up].  Weight gradients are summed in float32, rounded to bf16 once and
added to each expert's buffer.

Shapes: T tokens sorted by expert, P padded rows, E experts, D hidden, F width of an expert (its share on this rank), W
the same in whole tiles, B branches of the activation's input (gate and up: 2).
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from kernels.dispatch import ReferenceKernels
from moe.config import EXPERT_TILE as TILE
from moe.config import whole_tiles
from moe.dispatcher import ExpertInput
from moe.gradient_buffers import GradientBuffers
from moe.per_step import PerStep
from qsparse_layers.main_grad import place_holder
from qsparse_layers.mlp import activate
from qsparse_layers.parallel import QSparseLinearMixin

if TYPE_CHECKING:
    from kernels.topology import Topology


class BlockSparseExperts:
    """Runs the experts of one layer, if they are of this kind.

    Args:
        config: of the model, with the activation function.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._stacked: PerStep[StackedExperts] = PerStep()
        self._buffers = GradientBuffers(), GradientBuffers()

    @staticmethod
    def takes(tokens: ExpertInput, ups: Sequence[QSparseLinearMixin], downs: Sequence[QSparseLinearMixin]) -> bool:
        """Whether the experts are: not quantized, in bf16 on a GPU, with tokens."""
        if tokens.codes is not None or isinstance(ups[0].kernels, ReferenceKernels):
            return False
        is_plain = all(layer.format.is_plain for layer in (*ups, *downs))
        fits = tokens.x.shape[1] % 8 == 0 and len(tokens.x) > 0
        return is_plain and fits and tokens.x.dtype == ups[0].weight.dtype == torch.bfloat16

    def outputs(
        self, x: Tensor, offsets: Tensor, ups: Sequence[QSparseLinearMixin], downs: Sequence[QSparseLinearMixin]
    ) -> Tensor:
        """Outputs [T, D] of tokens [T, D], those of expert e from row offsets[e] on (int32 [E + 1])."""
        up_weights, down_weights = ([layer.weight for layer in layers] for layers in (ups, downs))
        stacked = self._stacked.get(ups[0], lambda: StackedExperts.of(up_weights, down_weights))
        places = Places.of(offsets, len(x), stacked)
        tiles = _Up.apply(x, _Work(places, stacked, self._buffers[0]), *up_weights)
        hidden = activate(tiles.view(places.up.grid[0], -1), self._config, ups[0].kernels.fused).view(-1, TILE, TILE)
        if ups[0].schedule.counting:
            bounds, rows = offsets.tolist(), places.hidden_rows(hidden.detach())[:, : stacked.width]
            for up, down, (start, end) in zip(ups, downs, pairwise(bounds), strict=True):
                up.counts.add(x[start:end], up.weight)
                down.counts.add(rows[start:end], down.weight)
        return _Down.apply(hidden, _Work(places, stacked, self._buffers[1]), *down_weights)


@dataclass(frozen=True)
class StackedExperts:
    """Weights of all experts of a rank, their widths filled up with zeros to whole tiles: W instead of F."""

    up: Tensor
    """[E B W, D]: of each expert gate, then up."""
    down: Tensor
    """[D, E W]."""
    num_experts: int
    width: int
    """F."""
    branches: int
    """B."""

    @classmethod
    @torch.no_grad()
    def of(cls, ups: Sequence[Tensor], downs: Sequence[Tensor]) -> "StackedExperts":
        """From weights [B F, D] and [D, F]."""
        hidden, width = downs[0].shape
        whole_width, branches = whole_tiles(width), ups[0].shape[0] // width
        make = ups[0].new_empty if width == whole_width else ups[0].new_zeros
        up, down = make(len(ups) * branches * whole_width, hidden), make(hidden, len(ups) * whole_width)
        stacked = cls(up, down, len(ups), width, branches)
        for ours, theirs in (*stacked.up_pairs(up, ups), *stacked.down_pairs(down, downs)):
            ours.copy_(theirs)
        return stacked

    def up_pairs(self, stacked: Tensor, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of a tensor like `up`, and of the same numbers in tensors [B F, D] of each expert."""
        parts = [part for weight in weights for part in weight.unflatten(0, (self.branches, self.width))]
        for rows, part in zip(stacked.unflatten(0, (len(parts), -1)), parts, strict=True):
            yield rows[: self.width], part

    def down_pairs(self, stacked: Tensor, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of a tensor like `down`, and the same numbers in tensors [D, F] of each expert."""
        for columns, weight in zip(stacked.chunk(len(weights), dim=1), weights, strict=True):
            yield columns[:, : self.width], weight


@dataclass(frozen=True)
class Places:
    """Where the tokens and tiles of a microbatch are."""

    rows_of_tokens: Tensor
    """int64 [T], among the padded rows."""
    tokens_of_rows: Tensor
    """int64 [P], T where no token is."""
    up: "Topology"
    down: "Topology"

    @classmethod
    def of(cls, offsets: Tensor, num_tokens: int, stacked: StackedExperts) -> "Places":
        """For tokens whose experts begin at `offsets`, int32 [E + 1]."""
        topology: Any = importlib.import_module("kernels.topology")
        padded = importlib.import_module("kernels.grouped_wgrad").pad_offsets(offsets)
        blocks = topology.expert_row_blocks(num_tokens, stacked.num_experts, TILE)
        token, row = (torch.arange(size, device=offsets.device) for size in (num_tokens, blocks * TILE))
        expert_T, expert_P = (
            torch.searchsorted(ends[1:].contiguous(), places, right=True)
            for ends, places in ((offsets, token), (padded, row))
        )
        expert_P, shift_E = expert_P.clamp(max=stacked.num_experts - 1), padded - offsets
        token_P = row - shift_E[expert_P]
        width = stacked.down.shape[1] // stacked.num_experts
        down = up = topology.expert_topology(padded, blocks, width, (TILE, TILE))
        if stacked.branches > 1:
            up = topology.expert_topology(padded, blocks, stacked.branches * width, (TILE, TILE))
        return cls(
            token + shift_E[expert_T],
            torch.where(token_P < offsets[1:][expert_P], token_P, num_tokens),
            up,
            down,
        )

    def repeat(self, x_TD: Tensor) -> Tensor:
        """[P, D], the last token where no token is."""
        return x_TD[self.tokens_of_rows.clamp(max=len(x_TD) - 1)]

    def pad(self, x_TD: Tensor) -> Tensor:
        """[P, D], zeros where no token is."""
        return pad(x_TD, (0, 0, 0, 1))[self.tokens_of_rows]

    def hidden_rows(self, tiles: Tensor) -> Tensor:
        """[T, W] out of the tiles of `down`, of which each row of tiles has as many."""
        by_row = tiles.unflatten(0, (len(self.tokens_of_rows) // TILE, -1)).transpose(1, 2)
        return by_row.flatten(2, 3).flatten(0, 1)[self.rows_of_tokens]


@dataclass(frozen=True)
class _Work:
    """Everything but what has gradients."""

    places: Places
    stacked: StackedExperts
    buffers: GradientBuffers


class _Up(torch.autograd.Function):
    """Tiles of X W_up^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: _Work, *weights: Tensor) -> Tensor:
        x_PD = work.places.repeat(x)  # rows of no token meet gradients of zero
        ctx.work, ctx.weights = work, weights
        ctx.save_for_backward(x_PD)
        return _kernels().sdd(x_PD, work.stacked.up, work.places.up, b_layout="nk")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x_PD,) = ctx.saved_tensors
        work: _Work = ctx.work
        tiles, topology = grads[0].contiguous(), work.places.up
        dx = _kernels().dsd(tiles, work.stacked.up, topology)[work.places.rows_of_tokens]
        dw = _kernels().dsd(tiles, x_PD, topology, form="S^T")
        if (buffers := work.buffers.table(ctx.weights)) is not None:
            _adding().add_below_each_other(dw, buffers, num_parts=work.stacked.branches)
            return dx, None, *map(place_holder, ctx.weights)
        return dx, None, *_apart(dw, ctx.weights, work.stacked.up_pairs)


class _Down(torch.autograd.Function):
    """S W_down^T for hidden tiles S."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work, *weights: Tensor) -> Tensor:
        ctx.work, ctx.weights = work, weights
        ctx.save_for_backward(hidden)
        y_PD = _kernels().dsd(hidden, work.stacked.down, work.places.down, b_layout="nk")
        return y_PD[work.places.rows_of_tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        work: _Work = ctx.work
        grad_PD, topology = work.places.pad(grads[0]), work.places.down
        dhidden = _kernels().sdd(grad_PD, work.stacked.down, topology)
        dw = _kernels().dds(grad_PD.t().contiguous(), hidden, topology)
        if (buffers := work.buffers.table(ctx.weights)) is not None:
            _adding().add_side_by_side(dw, buffers)
            return dhidden, None, *map(place_holder, ctx.weights)
        return dhidden, None, *_apart(dw, ctx.weights, work.stacked.down_pairs)


def _apart(
    dw: Tensor,
    weights: Sequence[Tensor],
    pairs_of: Callable[[Tensor, Sequence[Tensor]], Iterable[tuple[Tensor, Tensor]]],
) -> list[Tensor]:
    """The gradient of each weight out of those of all."""
    dws = list(map(torch.empty_like, weights))
    for ours, theirs in pairs_of(dw, dws):
        theirs.copy_(ours)
    return dws


def _adding() -> Any:
    return importlib.import_module("kernels.stacked_gradients")


def _kernels() -> Any:
    return importlib.import_module("kernels.block_sparse")
