"""A mixture of experts written from the papers' equations, in float64: straight-through estimators and loops."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PlainMoE:
    """Weights as in the model under test: router [E, D], per expert gate/up [2 F, D], down [D, F], SubLN gain [F]."""

    router: Tensor
    up: list[Tensor]
    down: list[Tensor]
    gain: list[Tensor]
    top_k: int
    sparsity: float
    capacity: int | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs for tokens that were routed together."""
        logits = x_TD @ self.router.t()
        chosen = logits.topk(self.top_k, dim=-1)
        probs = torch.softmax(chosen.values.to(torch.float32), dim=-1).to(x_TD.dtype)
        weights = torch.zeros_like(logits).scatter(1, chosen.indices, probs)
        if self.capacity is not None:
            kept = weights.topk(min(self.capacity, len(x_TD)), dim=0).indices
            weights = weights * torch.zeros_like(weights).scatter(0, kept, 1.0)
        return sum(self._expert(e, x_TD) * weights[:, e : e + 1] for e in range(len(self.up)))

    def _expert(self, e: int, x_TD: Tensor) -> Tensor:
        half = len(self.up[e]) // 2
        gate, up = (_linear(x_TD, part, self.sparsity) for part in self.up[e].split(half))
        hidden = gate.relu().square() * up
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5) * self.gain[e]
        return _linear(normed, self.down[e], self.sparsity)


def _linear(x: Tensor, weight: Tensor, sparsity: float) -> Tensor:
    """arXiv 2407.10969 eq. 4-10 with straight-through estimators; dW uses the masked codes."""
    scale = (x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127).to(torch.float32).double()
    codes = (x.detach() / scale).round().clamp(-128, 127)
    order = codes.abs().sort(dim=-1, descending=True, stable=True).indices
    kept = order[:, : int((1 - sparsity) * x.shape[-1])]
    sparse = torch.zeros_like(codes).scatter(1, kept, codes.gather(1, kept)) * scale
    beta = weight.detach().abs().mean().clamp(min=1e-5).to(torch.float32).double()
    ternary = (weight.detach() / beta).round().clamp(-1, 1) * beta
    assert math.isfinite(float(beta))
    return (x + (sparse - x).detach()) @ (weight + (ternary - weight).detach()).t()
