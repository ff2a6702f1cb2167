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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        width = downs[0].shape[1]
        branches, missing = ups[0].shape[0] // width, -width % TILE
        parts = [pad(weight.unflatten(0, (branches, width)), (0, 0, 0, missing)) for weight in ups]
        up = torch.stack([part.unflatten(1, (-1, TILE)).transpose(0, 1) for part in parts])
        down = torch.cat([pad(weight, (0, missing)) for weight in downs], dim=1)
        return cls(up.flatten(0, 3), down, len(ups), width, branches)

    def split_up(self, gradient: Tensor) -> Iterator[Tensor]:
        """Of a gradient like `up` the parts [B, F, D] of each expert; without padding views [B, F / TILE, TILE, D]."""
        for part in gradient.unflatten(0, (self.num_experts, -1, self.branches, TILE)):
            by_branch = part.transpose(0, 1)
            yield by_branch if self.width % TILE == 0 else by_branch.flatten(1, 2)[:, : self.width]

    def split_down(self, gradient: Tensor) -> Iterator[Tensor]:
        """Of a gradient like `down` the parts [D, F] of each expert."""
        for part in gradient.chunk(self.num_experts, dim=1):
            yield part[:, : self.width]


@dataclass(frozen=True)
class Places:
    """Where the tokens and tiles of a microbatch are."""

    tokens: Tensor
    """int64 [T], row of each token among the padded ones."""
    num_rows: int
    up: "Topology"
    down: "Topology"

    @classmethod
    def of(cls, offsets: Tensor, num_tokens: int, stacked: StackedExperts) -> "Places":
        """For tokens whose experts begin at `offsets`, int32 [E + 1]."""
        topology: Any = importlib.import_module("kernels.topology")
        padded = importlib.import_module("kernels.grouped_wgrad").pad_offsets(offsets)
        blocks = topology.expert_row_blocks(num_tokens, len(offsets) - 1, TILE)
        token_T = torch.arange(num_tokens, device=offsets.device)
        expert_T = torch.searchsorted(offsets[1:].contiguous(), token_T, right=True)
        width = stacked.down.shape[1] // stacked.num_experts
        down = up = topology.expert_topology(padded, blocks, width, (TILE, TILE))
        if stacked.branches > 1:
            up = topology.expert_topology(padded, blocks, stacked.branches * width, (TILE, TILE))
        return cls(token_T + (padded - offsets)[expert_T], blocks * TILE, up, down)

    def pad(self, x_TD: Tensor) -> Tensor:
        """[P, D], zeros where no token is."""
        return x_TD.new_zeros(self.num_rows, x_TD.shape[1]).index_copy_(0, self.tokens, x_TD)

    def hidden_rows(self, tiles: Tensor) -> Tensor:
        """[T, W] out of the tiles of `down`, of which each row of tiles has as many."""
        by_row = tiles.unflatten(0, (self.num_rows // TILE, -1)).transpose(1, 2)
        return by_row.flatten(2, 3).flatten(0, 1)[self.tokens]


class _Up(torch.autograd.Function):
    """Tiles of X W_up^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, stacked: StackedExperts, *weights: Tensor) -> Tensor:
        x_PD = places.pad(x)
        ctx.places, ctx.stacked, ctx.weights = places, stacked, weights
        ctx.save_for_backward(x_PD)
        return _kernels().sdd(x_PD, stacked.up, places.up, b_layout="nk")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x_PD,) = ctx.saved_tensors
        tiles, topology = grads[0].contiguous(), ctx.places.up
        dx = _kernels().dsd(tiles, ctx.stacked.up, topology)[ctx.places.tokens]
        dw = _kernels().dsd(tiles, x_PD, topology, form="S^T")
        return dx, None, None, *map(_add, ctx.weights, ctx.stacked.split_up(dw))


class _Down(torch.autograd.Function):
    """S W_down^T for hidden tiles S."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: Places, stacked: StackedExperts, *weights: Tensor) -> Tensor:
        ctx.places, ctx.stacked, ctx.weights = places, stacked, weights
        ctx.save_for_backward(hidden)
        return _kernels().dsd(hidden, stacked.down, places.down, b_layout="nk")[places.tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        grad_PD, topology = ctx.places.pad(grads[0]), ctx.places.down
        dhidden = _kernels().sdd(grad_PD, ctx.stacked.down, topology)
        dw = _kernels().dds(grad_PD.t().contiguous(), hidden, topology)
        return dhidden, None, None, *map(_add, ctx.weights, ctx.stacked.split_down(dw))


def _add(weight: Tensor, dw: Tensor) -> Tensor:
    """Add dW, its rows in any shape, to the weight's buffer; returns what autograd gets."""
    buffer = main_grad_of(weight)
    if buffer is None:
        return dw.reshape(weight.shape).to(weight.dtype)
    buffer.view(dw.shape).add_(dw)
    return place_holder(weight)


def _kernels() -> Any:
    return importlib.import_module("kernels.block_sparse")
