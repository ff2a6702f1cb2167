"""Ternary codes of all weights of a model at once, right after an optimizer step.

A layer makes its codes when it first runs after its weight has changed (`linear_call.TernaryCache`).  On a GPU that is
three launches and an all-reduce for every layer and step; here it is three launches and one all-reduce for all layers
of a process group (`kernels.ternarize`).  The layers find the codes in their caches and do not know who put them there.
Layers that keep their codes in bf16, too (`run.keep_bf16_weights`), are a group of their own: one launch writes both.

Not for parameters that are still on their way when the step ends (`parallel.overlap_param_gather`): those are ready
only when their layer runs.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from kernels import reference
from kernels.dispatch import Expanded
from kernels.ternarize import RowTable, codes, part_sums, row_table
from qsparse_layers.collectives import group_size
from qsparse_layers.linear_call import Operand
from qsparse_layers.parallel import QSparseLinearMixin
from qsparse_layers.ternary_pieces import num_scales, scale_of_row


class _Group:
    """Layers whose weights are sharded over the same ranks, and the buffers that hold their codes and scales."""

    def __init__(self, ranks: dist.ProcessGroup, layers: list[QSparseLinearMixin]) -> None:
        self._ranks, self._layers, self._table = ranks, layers, _table(layers)
        device = layers[0].weight.device
        self._codes = torch.empty(self._table.num_codes, dtype=torch.int8, device=device)
        self._row_scales = torch.empty(len(self._table.part), dtype=torch.float32, device=device)
        self._expanded: Expanded | None = None
        if layers[0].expander is not None:
            # 16 bytes apart: kernels have another compiled form for pointers of other alignments.
            largest = torch.empty(len(layers), 4, dtype=torch.float32, device=device)[:, 0]
            self._expanded = Expanded(torch.empty_like(self._codes, dtype=torch.bfloat16), largest)
        self._operands = list(self._views())

    def _views(self) -> Iterator[Operand]:
        """Each layer's place in the buffers."""
        code, row = 0, 0
        for number, layer in enumerate(self._layers):
            weight, expanded = layer.weight, None
            place, rows = slice(code, code + weight.numel()), self._row_scales[row : row + len(weight)]
            if self._expanded is not None:
                values, largest = self._expanded.values[place], self._expanded.scale[number : number + 1]
                expanded = Expanded(values.view_as(weight), largest)
            scale = rows[:1] if num_scales(layer) == 1 else rows.unsqueeze(-1)
            yield Operand(self._codes[place].view_as(weight), scale, expanded)
            code, row = place.stop, row + len(weight)

    def refresh(self, version: int) -> None:
        """In place: a CUDA graph of a step reads the same addresses for ever."""
        dtype, size = self._layers[0].weight.dtype, group_size(self._ranks)
        sums = part_sums(self._table, dtype)
        if size > 1:
            dist.all_reduce(sums, group=self._ranks)
        scales = reference.absmean_scale(sums, self._table.part_size * size)
        codes(self._table, scales, dtype, out=self._codes, expanded=self._expanded)
        torch.index_select(scales, 0, self._table.part, out=self._row_scales)
        for layer, operand in zip(self._layers, self._operands, strict=True):
            layer.cache.put(version, operand)


class TernaryWeights:
    """Keeps the caches of `layers` up to date.

    Args:
        layers: linear layers on a GPU, all of one type; those that are not ternary are left out.
    """

    def __init__(self, layers: Iterable[QSparseLinearMixin]) -> None:
        groups: dict[tuple[dist.ProcessGroup, bool], list[QSparseLinearMixin]] = {}
        for layer in layers:
            if layer.format.weights == "ternary":
                groups.setdefault((layer.tp_group, layer.expander is not None), []).append(layer)
        self._groups = [_Group(ranks, members) for (ranks, _), members in groups.items()]

    @torch.no_grad()
    def refresh(self, version: int) -> None:
        """Compute the codes of the weights as they are now and hand them out as those of `version`."""
        for group in self._groups:
            group.refresh(version)


def _table(layers: list[QSparseLinearMixin]) -> RowTable:
    return row_table([layer.weight.detach() for layer in layers], [scale_of_row(layer) for layer in layers])
