"""Experts whose linear layers are Q-Sparse and BitNet variants, run one after the other.

megatron-core multiplies the router probability into the input of the down projection.  A SubLN there normalizes a
per-token factor away, and with it the router's gradient; absmax codes would hide it, too.  Here the probability
multiplies the expert's output, which for an ordinary linear layer is the same number.
"""

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class QSparseSequentialMLP(SequentialMLP):
    """megatron-core's sequential experts, weighted after the down projection."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run each local expert on its tokens.

        Args:
            permuted_local_hidden_states: [tokens, hidden], sorted by expert.
            tokens_per_expert: [local experts].
            permuted_probs: [tokens], router probability of each token for its expert.

        Returns:
            [tokens, hidden] weighted by the probabilities, and no bias.
        """
        ones = torch.ones_like(permuted_probs)
        output, bias = super().forward(permuted_local_hidden_states, tokens_per_expert, ones)
        return (output * permuted_probs.unsqueeze(-1)).to(output.dtype), bias
