"""Measured sparsity: zeros among the values that a layer really multiplied, counted where they are made.

Sparsity counts as the paper counts (arXiv 2407.10969 sec. 4.2, Table 2): the share of zero inputs of each projection,
weighted by the projection's number of weights; activated parameters are N (1 - S).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class ZeroCounts:
    """Running counts of one layer: [input zeros, inputs, weight zeros, weights], float64 on the layer's device."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Count the zeros of one forward pass; no host synchronization."""
        zeros = torch.stack([(x == 0).sum(), (weight == 0).sum()]).double()
        sizes = torch.tensor([x.numel(), weight.numel()], dtype=torch.float64, device=x.device)
        counts = torch.stack([zeros, sizes], dim=1).flatten()
        self._counts = counts if self._counts is None else self._counts + counts

    def take(self, device: torch.device) -> Tensor:
        """The counts since the last call, [4] float64; zeros if the layer did not run."""
        counts, self._counts = self._counts, None
        return torch.zeros(4, dtype=torch.float64, device=device) if counts is None else counts


@dataclass(frozen=True)
class LayerSparsity:
    """Measured over the forward passes since the last report."""

    path: str
    sparsity: float
    """Share of zeros among the layer's inputs."""
    ternary_zeros: float
    """Share of zeros among the layer's weight codes."""
    num_weights: int
    """Weights of the whole, unsharded matrix; of a layer's experts those that a token visits."""


def model_sparsity(layers: Iterable[LayerSparsity]) -> tuple[float, float]:
    """Weighted mean of input sparsity and of ternary zeros over projections."""
    layers = list(layers)
    total = sum(layer.num_weights for layer in layers) or 1
    return (
        sum(layer.sparsity * layer.num_weights for layer in layers) / total,
        sum(layer.ternary_zeros * layer.num_weights for layer in layers) / total,
    )
