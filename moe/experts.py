"""Experts whose linear layers are Q-Sparse and BitNet variants, run one after the other.

megatron-core multiplies the router probability into the input of the down projection.  A SubLN there normalizes a
per-token factor away, and with it the router's gradient; absmax codes would hide it, too.  Here the probability
multiplies the expert's output, which for an ordinary linear layer is the same number.

Each expert's matrices have ternary scales of their own.  `moe.grouped` runs the same modules in one launch.
"""

from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, cat

from moe.dispatcher import ExpertInput
from moe.front import weigh
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import Sharding
from qsparse_layers.mlp import activate, activation_name


class QSparseSequentialMLP(SequentialMLP):
    """megatron-core's sequential experts, which take codes and weight their output."""

    def forward(
        self, tokens: ExpertInput, tokens_per_expert: Tensor, probs: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run each local expert on its tokens.

        Args:
            tokens: [T, hidden], sorted by expert.
            tokens_per_expert: [local experts], summing to T.
            probs: [T], router probability of each token for its expert.

        Returns:
            [T, hidden] weighted by the probabilities, and no bias.
        """
        self._await_weights()
        output = self.outputs(tokens, tokens_per_expert)
        return weigh(output, probs, self.local_experts[0].linear_fc2.kernels.fused), None

    def _await_weights(self) -> None:
        """Run the forward pre-hooks of the layers, which are not all called: overlapped gathers of weights end there.

        Hooks that run once more when a layer is called find their gather done.
        """
        for expert in self.local_experts:
            for layer in (expert.linear_fc1, expert.linear_fc2):
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, ())

    def outputs(self, tokens: ExpertInput, tokens_per_expert: Tensor) -> Tensor:
        """Unweighted outputs [T, hidden]; an expert without tokens runs, too, since its ranks may communicate."""
        parts = tokens.split(tokens_per_expert.tolist())
        return cat([_run(expert, part) for expert, part in zip(self.local_experts, parts, strict=True)])


def _run(expert: MLP, tokens: ExpertInput) -> Tensor:
    """One expert; the dispatcher does the communication of its first product."""
    up, down = expert.linear_fc1, expert.linear_fc2
    if tokens.codes is None:
        hidden, _ = up(tokens.x)
    else:
        call = up.call(Sharding(weight=up.tp_group))
        hidden = qsparse_linear(tokens.x, up.weight, call, codes=tokens.codes)
    activation = activation_name(expert.config)
    if activation is not None and down.front(activation) is not None:
        return down(hidden, activation)[0]
    return down(activate(hidden, expert.config, down.kernels.fused))[0]
