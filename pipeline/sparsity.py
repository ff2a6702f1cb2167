"""Measured sparsity of every projection of the whole model, gathered from all ranks in one all-reduce.

The experts of an MoE layer count as one projection, by the tokens that each got: a token visits k of E of them, so
their weights enter with the share k / E, and activated parameters are N_active (1 - S).
"""

import re

import torch
import torch.distributed as dist

from moe.config import MoEConfig
from pipeline.world import World
from qsparse_layers.rules import ConfiguredLayer
from qsparse_layers.schedules import Schedule
from qsparse_layers.stats import LayerSparsity

_EXPERT = re.compile(r"\.local_experts\.\d+")


class SparsityMeter:
    """Counts zeros on demand; collective, built on all ranks.

    Args:
        layers: Q-Sparse linear layers of this rank.
        schedule: shared by the layers; its `counting` switch is this meter's.
        world: this process's place in the layout.
        moe: the experts' configuration, if there are any.
    """

    def __init__(
        self, layers: list[ConfiguredLayer], schedule: Schedule, world: World, moe: MoEConfig | None = None
    ) -> None:
        self._layers, self._schedule, self._device = layers, schedule, world.device
        mine = {layer.path: layer.module.weight.numel() * layer.module.tp_group.size() for layer in layers}
        everyone: list[dict[str, int]] = [{} for _ in range(world.size)]
        dist.all_gather_object(everyone, mine)
        self.num_weights = {path: count for part in everyone for path, count in part.items()}
        """Weights of each projection of the whole model, unsharded, by path."""
        self._visited: dict[str, float] = {}
        for path, count in self.num_weights.items():
            merged = _EXPERT.sub("", path)
            share = moe.top_k / moe.num_experts if moe is not None and merged != path else 1.0
            self._visited[merged] = self._visited.get(merged, 0.0) + share * count
        self._index = {path: index for index, path in enumerate(self._visited)}

    def start(self) -> None:
        """Count from the next forward pass on."""
        self._schedule.counting = True

    def stop(self) -> list[LayerSparsity]:
        """Stop counting; shares of zeros of all projections since `start`."""
        self._schedule.counting = False
        counts = torch.zeros(len(self._index), 4, dtype=torch.float64, device=self._device)
        for layer in self._layers:
            counts[self._index[_EXPERT.sub("", layer.path)]] += layer.module.counts.take(self._device)
        dist.all_reduce(counts)
        return [
            LayerSparsity(path, _share(x_zeros, inputs), _share(w_zeros, weights), round(self._visited[path]))
            for path, (x_zeros, inputs, w_zeros, weights) in zip(self._index, counts.tolist(), strict=True)
        ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
