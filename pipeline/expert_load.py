"""Where the tokens of a logged step went, over all ranks and MoE layers, in one all-reduce.

Every token is routed on exactly one rank (data-, context- and sequence-parallel ranks hold different tokens, pipeline
ranks different layers), so the sum over all ranks is the count over the global batch.
"""

import torch
import torch.distributed as dist

from moe.layer import RoutedLayer
from moe.load import LayerLoad
from pipeline.world import World


class ExpertLoadMeter:
    """Counts routing decisions on demand; collective, built on all ranks.

    Args:
        layers: MoE layers of this rank.
        world: this process's place in the layout.
    """

    def __init__(self, layers: list[RoutedLayer], world: World) -> None:
        self._layers, self._device = layers, world.device
        everyone: list[dict[str, tuple[int, int]]] = [{} for _ in range(world.size)]
        dist.all_gather_object(everyone, {layer.path: (layer.load.size, layer.load.top_k) for layer in layers})
        self._shapes = {path: shape for part in everyone for path, shape in part.items()}
        self._index = {path: index for index, path in enumerate(self._shapes)}

    def start(self) -> None:
        """Count from the next forward pass on."""
        self._switch(on=True)

    def stop(self) -> list[LayerLoad]:
        """Stop counting; the decisions since `start`, layer by layer; empty for a model without experts."""
        self._switch(on=False)
        if not self._shapes:
            return []
        size = next(iter(self._shapes.values()))[0]
        sums = torch.zeros(len(self._index), size, dtype=torch.float64, device=self._device)
        for layer in self._layers:
            sums[self._index[layer.path]] += layer.load.take(self._device)
        dist.all_reduce(sums)
        rows = zip(self._shapes.items(), sums.tolist(), strict=True)
        return [LayerLoad.from_sums(path, row, top_k) for (path, (_, top_k)), row in rows]

    def _switch(self, *, on: bool) -> None:
        for layer in self._layers:
            layer.load.counting = on
