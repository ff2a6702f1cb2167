"""Where tokens go: counts of one router, and what they say about its balance.

Per logged step and MoE layer, over the tokens t of the global batch, E experts, k per token, router scores p (softmax
of the logits z),

    tokens[e]       token copies that expert e multiplied
    imbalance       max_e tokens[e] / mean_e tokens[e]            1: balanced; the slowest expert's share of the time
    dropped share   1 - sum_e tokens[e] / (k T)                   0 without a capacity
    entropy         mean_t -sum_e p log p                         ln E: indifferent, 0: certain
    z               mean_t (log sum_e exp z)^2                    the z-loss before its coefficient

megatron-core keeps such numbers in a process-wide tracker; here each router holds its own, and only while asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LOAD_PREFIX = "layer_expert_tokens"


class RouterLoad:
    """Running sums of one router on its device: tokens of each expert, then tokens routed, entropy and z^2."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.counting = False
        """True while decisions are counted."""
        self._sums: Tensor | None = None

    @property
    def size(self) -> int:
        """Length of what `take` returns."""
        return self.num_experts + 3

    def add(self, logits: Tensor, routing_map: Tensor) -> None:
        """Count one microbatch; the second of two passes if layers are recomputed, none of an evaluation."""
        if not self.counting or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            z_TE = logits.detach().flatten(0, -2).double()
            log_sum = z_TE.logsumexp(-1, keepdim=True)
            log_p = z_TE - log_sum
            entropy = -(log_p.exp() * log_p).sum()
            tokens = torch.full_like(entropy, z_TE.shape[0])
            sums = torch.cat([routing_map.sum(0).double(), torch.stack([tokens, entropy, log_sum.square().sum()])])
            self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device) -> Tensor:
        """The sums since the last call, float64; zeros if the router did not run."""
        sums, self._sums = self._sums, None
        return torch.zeros(self.size, dtype=torch.float64, device=device) if sums is None else sums


@dataclass(frozen=True)
class LayerLoad:
    """Decisions of one router over a global batch."""

    path: str
    """Path of the MoE layer."""
    tokens: tuple[float, ...]
    """Token copies of each expert."""
    dropped_share: float
    entropy: float
    """nats"""
    z_loss: float

    @property
    def imbalance(self) -> float:
        """Largest count over the mean."""
        total = sum(self.tokens)
        return max(self.tokens) * len(self.tokens) / total if total else 0.0

    @classmethod
    def from_sums(cls, path: str, sums: list[float], top_k: int) -> "LayerLoad":
        """From `RouterLoad.take`, summed over ranks."""
        *tokens, routed, entropy, z_squared = sums
        count = routed or 1.0
        return cls(path, tuple(tokens), 1.0 - sum(tokens) / (top_k * count), entropy / count, z_squared / count)


def load_metrics(layers: list[LayerLoad]) -> Mapping[str, float]:
    """Names and values for metrics.jsonl: means over layers, and the tokens of every expert."""
    if not layers:
        return {}
    count = len(layers)
    record = {
        "moe/imbalance": sum(layer.imbalance for layer in layers) / count,
        "moe/max_imbalance": max(layer.imbalance for layer in layers),
        "moe/dropped_share": sum(layer.dropped_share for layer in layers) / count,
        "moe/router_entropy": sum(layer.entropy for layer in layers) / count,
        "moe/router_z_loss": sum(layer.z_loss for layer in layers) / count,
    }
    for layer in layers:
        for expert, tokens in enumerate(layer.tokens):
            record[f"{LOAD_PREFIX}/{layer.path}.experts.{expert}"] = tokens
    return record
