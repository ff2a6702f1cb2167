"""Causal attention through torch's scaled_dot_product_attention, with the interface of megatron-core's.

For CPUs and for GPUs without Transformer Engine: flash or memory-efficient kernels instead of megatron's three
separate products.  Context parallelism needs Transformer Engine's attention.

Packed sequences (megatron-core's `thd` layout, [tokens, heads, head_dim] with boundaries in `PackedSeqParams`) are
attended to document by document, each as if it were alone.  A block-diagonal mask over all tokens would give the same
at tokens^2 instead of the sum of squares; the price is one call per document, which is slow for very short ones.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
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

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Causal attention.

        Args:
            query: [sequence, batch, heads, head_dim]; packed: [tokens, heads, head_dim].
            key: the same with the heads of keys and values.
            value: as `key`.
            attention_mask: None: causality is all there is.
            packed_seq_params: boundaries of the documents of packed sequences.

        Returns:
            [sequence, batch, heads * head_dim]; packed: [tokens, heads * head_dim].

        Raises:
            ValueError: a mask is given.
        """
        if attention_mask is not None:
            raise ValueError("SDPACoreAttention is causal and takes no attention mask")
        dropout = self.dropout if self.training else 0.0
        if torch.is_grad_enabled():
            value = value.contiguous()  # kept for the backward pass as a slice, it would keep all of q/k/v
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            if packed_seq_params is None:
                q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
                return self._attend(q, k, v, dropout).permute(2, 0, 1, 3).flatten(2)
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
            documents = [self._attend(q[None], k[None], v[None], dropout) for q, k, v in parts]
            return torch.cat(documents, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """[batch, heads, sequence, head_dim] each -> the same."""
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, dropout_p=dropout, scale=self.scale, enable_gqa=self.grouped
        )
