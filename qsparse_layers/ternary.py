"""Ternary codes of all weights of a model at once, right after an optimizer step.

A layer makes its codes when it first runs after its weight has changed (`functional.TernaryCache`).  On a GPU that is
three launches and an all-reduce for every layer and step; here it is three launches and one all-reduce for all layers
of a process group (`kernels.ternarize`).  The layers find the codes in their caches and do not know who put them there.

Not for parameters that are still on their way when the step ends (`parallel.overlap_param_gather`): those are ready
only when their layer runs.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from kernels import reference
from kernels.ternarize import RowTable, codes, part_sums, row_table
from qsparse_layers.parallel import QSparseLinearMixin
from qsparse_layers.selection import group_size


class _Group:
    """Layers whose weights are sharded over the same ranks, and the buffers that hold their codes and scales."""

    def __init__(self, ranks: dist.ProcessGroup, layers: list[QSparseLinearMixin]) -> None:
        self._ranks, self._layers, self._table = ranks, layers, _table(layers)
        device = layers[0].weight.device
        self._codes = torch.empty(self._table.num_codes, dtype=torch.int8, device=device)
        self._row_scales = torch.empty(len(self._table.part), dtype=torch.float32, device=device)

    def refresh(self, version: int) -> None:
        """In place: a CUDA graph of a step reads the same addresses for ever."""
        dtype, size = self._layers[0].weight.dtype, group_size(self._ranks)
        sums = part_sums(self._table, dtype)
        if size > 1:
            dist.all_reduce(sums, group=self._ranks)
        scales = reference.absmean_scale(sums, self._table.part_size * size)
        codes(self._table, scales, dtype, out=self._codes)
        torch.index_select(scales, 0, self._table.part, out=self._row_scales)
        of_weights = self._codes.split([layer.weight.numel() for layer in self._layers])
        of_rows = self._row_scales.split([layer.weight.shape[0] for layer in self._layers])
        for layer, values, row_scale in zip(self._layers, of_weights, of_rows, strict=True):
            scale = row_scale[:1] if _num_parts(layer) == 1 else row_scale.unsqueeze(-1)
            layer.cache.put(version, values.view_as(layer.weight), scale)


class TernaryWeights:
    """Keeps the caches of `layers` up to date.

    Args:
        layers: linear layers on a GPU, all of one type; those that are not ternary are left out.
    """

    def __init__(self, layers: Iterable[QSparseLinearMixin]) -> None:
        by_ranks: dict[dist.ProcessGroup, list[QSparseLinearMixin]] = {}
        for layer in layers:
            if layer.format.weights == "ternary":
                by_ranks.setdefault(layer.tp_group, []).append(layer)
        self._groups = [_Group(ranks, members) for ranks, members in by_ranks.items()]

    @torch.no_grad()
    def refresh(self, version: int) -> None:
        """Compute the codes of the weights as they are now and hand them out as those of `version`."""
        for group in self._groups:
            group.refresh(version)


def _num_parts(layer: QSparseLinearMixin) -> int:
    """Scales of a weight: one, or one per part."""
    return 1 if layer.format.ternary_scale == "matrix" else len(layer.parts.sizes)


def _table(layers: list[QSparseLinearMixin]) -> RowTable:
    parts = []
    for layer in layers:
        part_of_row = layer.parts.expand(torch.arange(len(layer.parts.sizes)))
        parts.append(part_of_row if _num_parts(layer) > 1 else torch.zeros_like(part_of_row))
    return row_table([layer.weight.detach() for layer in layers], parts)
