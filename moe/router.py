"""megatron-core's top-k router, which counts where tokens go.

The router is never quantized and its logits, probabilities and losses are float32 (float64 in a float64 model): its
weight is 1 / (12 * width) of an expert's, and a decision that flips sends a token elsewhere.  Scores, balancing and
capacity are megatron-core's; the one override looks at what they decided.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe.load import RouterLoad


class QSparseRouter(TopKRouter):
    """`TopKRouter` with a count of its decisions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # megatron-core makes it on the CPU and moves it with the first forward pass: too late for the optimizer.
        self.weight.data = self.weight.data.to(torch.cuda.current_device())
        self.load = RouterLoad(self.config.num_moe_experts, self.config.moe_router_topk)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Probabilities and choices [tokens, experts] for logits [s, b, experts]."""
        probs, routing_map = super().routing(logits, *args, **kwargs)
        self.load.add(logits, routing_map)
        return probs, routing_map
