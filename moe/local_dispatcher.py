"""Dispatch without communication: all experts are here, so tokens are only sorted by expert.

megatron-core's dispatchers do the same for one rank, but sort what is sorted already once more (by source rank, of
which there is one) and bring the tokens of each expert to the host.  Here nothing waits for the GPU, which is what lets
a whole training step become a CUDA graph.  Rows, their order and the sums of combine are those of megatron-core's
all-to-all dispatcher, bit for bit: both permute with the same functions.

Dropless only: with a capacity the number of rows depends on the data.

Shapes: t tokens, k experts per token, E experts, T = k t rows.
"""

from typing import Any

from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def can_stay_local(dispatcher: MoETokenDispatcher) -> bool:
    """Whether `LocalDispatcher` does what `dispatcher` does."""
    is_alone = dispatcher.ep_size == 1 and dispatcher.tp_size == 1 and dispatcher.shared_experts is None
    is_dropless = dispatcher.config.moe_expert_capacity_factor is None
    return isinstance(dispatcher, MoEAlltoAllTokenDispatcher) and is_alone and is_dropless


class LocalDispatcher:
    """`MoEAlltoAllTokenDispatcher` of one rank without capacity.

    Args:
        config: of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._top_k, self._fused = config.moe_router_topk, config.moe_permute_fusion

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, X] -> rows [T, X] sorted by expert, and their probabilities [T]."""
        self.hidden_shape, self.routing_map = tokens.shape, routing_map  # `CodeDispatcher` changes their widths
        tokens = tokens.view(-1, tokens.shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        permuted: Any = permute(
            tokens,
            routing_map,
            probs=probs,
            num_out_tokens=len(tokens) * self._top_k,
            fused=self._fused,
        )
        rows, probs, self.row_of_token, *_ = permuted
        return rows, probs

    def token_dispatch(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As they are."""
        return rows, probs

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, how many each expert has (int64 [E], on the rows' device), and their probabilities."""
        return rows, self.routing_map.sum(dim=0), probs

    def combine_preprocess(self, hidden: Tensor) -> Tensor:
        """As they are."""
        return hidden

    def token_combine(self, hidden: Tensor) -> Tensor:
        """As they are."""
        return hidden

    def combine_postprocess(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [s, b, D], the rows of each token summed."""
        summed: Tensor = unpermute(
            hidden,
            self.row_of_token,
            restore_shape=self.hidden_shape_before_permute,
            routing_map=self.routing_map,
            fused=self._fused,
        )
        return summed.view(self.hidden_shape)
