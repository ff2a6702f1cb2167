"""Experts in bf16 as block-sparse products, after MegaBlocks (arXiv 2211.15841 sec. 4 and 5).

The hidden layer of all experts is one matrix, [tokens, experts x width].  A token meets its own expert, so this matrix
is zero but for a block per expert, and with each expert's tokens padded to whole tiles it is sparse by tiles:

    forward     H = X W_up^T     at the tiles: sdd         A = activation(H)       Y = A W_down^T           dsd
    backward    dA = dY W_down   at the tiles: sdd         dH = activation'(dA)    dX = dH W_up             dsd
                dW_down = dY^T A                    dds                            dW_up = dH^T X           dsd, S^T

Every product is one launch, whatever the token counts, and nothing waits for the GPU.  Quantized experts run on grouped
products instead (`moe.grouped`): top-K and SubLN look at a token's whole hidden row, which tiles do not keep together.

Gate and up rows of the weight alternate by tiles in `StackedExperts`, so the tiles that an activation multiplies are
neighbours in memory: it runs over them as if each pair were a row [gate | up].  Weight gradients are summed in float32,
rounded to bf16 once and added to each expert's buffer.

Shapes: T tokens sorted by expert, P padded rows, E experts, D hidden, F width of an expert (its share on this rank), W
the same in whole tiles, B branches of the activation's input (gate and up: 2).
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from kernels.dispatch import ReferenceKernels
from moe.config import EXPERT_TILE as TILE
from moe.dispatcher import ExpertInput
from moe.per_step import PerStep
from qsparse_layers.main_grad import main_grad_of, place_holder
from qsparse_layers.mlp import activate
from qsparse_layers.parallel import QSparseLinearMixin

if TYPE_CHECKING:
    from kernels.topology import Topology


Pairs = list[tuple[Tensor, Tensor]]
PairsOf = Callable[[Tensor, Sequence[Tensor]], Iterable[Pairs]]


class BlockSparseExperts:
    """Runs the experts of one layer, if they are of this kind.

    Args:
        config: of the model, with the activation function.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._stacked: PerStep[StackedExperts] = PerStep()

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
        tiles = _Up.apply(x, places, stacked, *up_weights).view(-1, stacked.branches * TILE * TILE)
        hidden = activate(tiles, self._config, ups[0].kernels.fused).view(-1, TILE, TILE)
        if ups[0].schedule.counting:
            bounds, rows = offsets.tolist(), places.hidden_rows(hidden.detach())[:, : stacked.width]
            for up, down, (start, end) in zip(ups, downs, pairwise(bounds), strict=True):
                up.counts.add(x[start:end], up.weight)
                down.counts.add(rows[start:end], down.weight)
        return _Down.apply(hidden, places, stacked, *down_weights)


@dataclass(frozen=True)
class StackedExperts:
    """Weights of all experts of a rank, their widths filled up with zeros to whole tiles: W instead of F."""

    up: Tensor
    """[E B W, D]: of each expert TILE rows of gate, TILE of up, and so on."""
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
        whole_width, branches = -(-width // TILE) * TILE, ups[0].shape[0] // width
        make = ups[0].new_empty if width == whole_width else ups[0].new_zeros
        up, down = make(len(ups) * branches * whole_width, hidden), make(hidden, len(ups) * whole_width)
        stacked = cls(up, down, len(ups), width, branches)
        for ours, theirs in chain.from_iterable((*stacked.up_pairs(up, ups), *stacked.down_pairs(down, downs))):
            ours.copy_(theirs)
        return stacked

    def up_pairs(self, stacked: Tensor, weights: Sequence[Tensor]) -> Iterator[Pairs]:
        """Views of a tensor like `up`, and of the same numbers in each expert's tensor [B F, D]."""
        whole, rest = divmod(self.width, TILE)
        for tiles, weight in zip(stacked.unflatten(0, (len(weights), -1, self.branches, TILE)), weights, strict=True):
            by_branch, rows = tiles.transpose(0, 1), weight.unflatten(0, (self.branches, self.width))
            pairs = [(by_branch[:, :whole], rows[:, : whole * TILE].unflatten(1, (whole, TILE)))]
            yield pairs if rest == 0 else [*pairs, (by_branch[:, whole, :rest], rows[:, whole * TILE :])]

    def down_pairs(self, stacked: Tensor, weights: Sequence[Tensor]) -> Iterator[Pairs]:
        """Views of a tensor like `down`, and of the same numbers in each expert's tensor [D, F]."""
        for columns, weight in zip(stacked.chunk(len(weights), dim=1), weights, strict=True):
            yield [(columns[:, : self.width], weight)]


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
        expert_P = expert_P.clamp(max=stacked.num_experts - 1)
        token_P = row - (padded - offsets)[expert_P]
        width = stacked.down.shape[1] // stacked.num_experts
        down = up = topology.expert_topology(padded, blocks, width, (TILE, TILE))
        if stacked.branches > 1:
            up = topology.expert_topology(padded, blocks, stacked.branches * width, (TILE, TILE))
        return cls(
            token + (padded - offsets)[expert_T],
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


class _Up(torch.autograd.Function):
    """Tiles of X W_up^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, stacked: StackedExperts, *weights: Tensor) -> Tensor:
        x_PD = places.repeat(x)  # rows of no token meet gradients of zero
        ctx.places, ctx.stacked, ctx.weights = places, stacked, weights
        ctx.save_for_backward(x_PD)
        return _kernels().sdd(x_PD, stacked.up, places.up, b_layout="nk")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x_PD,) = ctx.saved_tensors
        tiles, topology = grads[0].contiguous(), ctx.places.up
        dx = _kernels().dsd(tiles, ctx.stacked.up, topology)[ctx.places.rows_of_tokens]
        dw = _kernels().dsd(tiles, x_PD, topology, form="S^T")
        return dx, None, None, *_gradients(ctx.weights, dw, ctx.stacked.up_pairs)


class _Down(torch.autograd.Function):
    """S W_down^T for hidden tiles S."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: Places, stacked: StackedExperts, *weights: Tensor) -> Tensor:
        ctx.places, ctx.stacked, ctx.weights = places, stacked, weights
        ctx.save_for_backward(hidden)
        return _kernels().dsd(hidden, stacked.down, places.down, b_layout="nk")[places.rows_of_tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        grad_PD, topology = ctx.places.pad(grads[0]), ctx.places.down
        dhidden = _kernels().sdd(grad_PD, ctx.stacked.down, topology)
        dw = _kernels().dds(grad_PD.t().contiguous(), hidden, topology)
        return dhidden, None, None, *_gradients(ctx.weights, dw, ctx.stacked.down_pairs)


def _gradients(weights: Sequence[Tensor], dw: Tensor, pairs_of: PairsOf) -> list[Tensor]:
    """Add dW, stacked, to the weights' buffers, or unstack it where there are none; what autograd gets."""
    buffers = [buffer for buffer in map(main_grad_of, weights) if buffer is not None]
    if len(buffers) == len(weights):
        for ours, theirs in chain.from_iterable(pairs_of(dw, buffers)):
            theirs.add_(ours)
        return list(map(place_holder, weights))
    dws = list(map(torch.empty_like, weights))
    for ours, theirs in chain.from_iterable(pairs_of(dw, dws)):
        theirs.copy_(ours)
    return dws


def _kernels() -> Any:
    return importlib.import_module("kernels.block_sparse")
