"""Causal attention through torch's scaled_dot_product_attention, with the interface of megatron-core's.

For CPUs and for GPUs without Transformer Engine: flash or memory-efficient kernels instead of megatron's three
separate products.  Context parallelism needs Transformer Engine's attention.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor


class SDPACoreAttention(torch.nn.Module):
    """softmax(Q K^T / sqrt(d)) V with a causal mask; grouped key/value heads are not repeated in memory."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                "parallel.cp > 1 needs Transformer Engine's attention: set run.backend=te or parallel.cp=1"
            )
        dropout = options.get("attention_dropout")
        self.dropout = config.attention_dropout if dropout is None else dropout
        self.scale = options.get("softmax_scale")
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[sequence, batch, heads, head_dim] each -> [sequence, batch, heads * head_dim]."""
        if attention_mask is not None:
            raise ValueError("SDPACoreAttention is causal and takes no attention mask")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, dropout_p=dropout, scale=self.scale, enable_gqa=self.grouped
            )
        return out.permute(2, 0, 1, 3).flatten(2)
