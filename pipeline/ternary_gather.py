"""Parameters after an optimizer step, ternary weights as 2-bit codes instead of bf16 values.

With the distributed optimizer a data-parallel rank updates its shard of the parameters, and megatron-core gathers the
shards in bf16, 2 bytes per weight.  The products of a ternary layer need its codes and scales only:

    sums of |W| over the own shard -> all-reduce -> scale -> codes of the own shard -> all-gather, 1/4 byte per weight

They go to the layers' caches.  Other ranks' shards of the bf16 weights keep old values, which nothing reads: for a
checkpoint, and while layers mix weights with their quantization (its warm-up), they are gathered as ever.  Embeddings,
norms and layers that are not ternary travel in bf16 in every step (`bucket_shards`).

megatron-core is told that parameters are gathered during the next forward pass, and its hooks for that are taken off:
so it leaves the gather to this module.  Gradients, shards and optimizer state are as without, and so are checkpoints.

The price: nothing hides this gather behind computation, as `parallel.overlap_param_gather` hides the long one.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from kernels import reference
from kernels.code_messages import CodeMessages
from kernels.dispatch import Expanded
from pipeline.bucket_shards import ChosenValues, Run, rank_shards
from pipeline.model import Model
from qsparse_layers.collectives import group_size
from qsparse_layers.linear_call import Operand
from qsparse_layers.parallel import QSparseLinearMixin
from qsparse_layers.ternary_pieces import Piece, ReferencePieces, TritonPieces, num_scales, scale_of_row


class TernaryGather:
    """Brings parameters and ternary codes of all ranks up to date after an optimizer step.

    Args:
        model: whose layers get codes.
        chunks: its chunks in data parallelism, with the distributed optimizer and `overlap_param_gather`.
    """

    def __init__(self, model: Model, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks, self._schedule = chunks, model.schedule
        layers = [layer.module for layer in model.layers if layer.format.weights == "ternary"]
        weights = {layer.weight for layer in layers}
        by_ranks: dict[dist.ProcessGroup, list[Any]] = {}
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                by_ranks.setdefault(group.intra_distributed_optimizer_instance_group, []).extend(group.buckets)
        self._codes, self._others = [], []
        for ranks, buckets in by_ranks.items():
            self._others.append(ChosenValues(ranks, buckets, lambda parameter: parameter not in weights))
            owned = {parameter for bucket in buckets for parameter in bucket.params_list}
            if shared := [layer for layer in layers if layer.weight in owned]:
                self._codes.append(_SharedCodes(ranks, buckets, shared))

    @torch.no_grad()
    def refresh(self, version: int) -> None:
        """Gather what each rank has updated, codes as those of weight version `version`; collective."""
        if self._schedule.quantization < 1.0:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)
        else:
            for values in self._others:
                values.gather()
        for codes in self._codes:
            codes.gather(version)


class _SharedCodes:
    """Codes of the ternary weights that one group of data-parallel ranks shares.

    Args:
        ranks: the group.
        buckets: megatron-core's, of this group.
        layers: ternary layers whose weights are in these buckets.
    """

    def __init__(self, ranks: dist.ProcessGroup, buckets: list[Any], layers: list[QSparseLinearMixin]) -> None:
        self._ranks = ranks
        by_weight: dict[Tensor, QSparseLinearMixin] = {layer.weight: layer for layer in layers}
        self._scales = _Scales(layers)
        self._buckets, pieces = [], []
        for bucket in buckets:
            shards = rank_shards(bucket, ranks.size(), by_weight.__contains__)
            if any(shards):
                self._buckets.append(_BucketCodes(ranks, shards))
            for run in shards[ranks.rank()]:
                layer = by_weight[run.parameter]
                pieces.append(Piece(layer, self._scales.first[layer], run.start, run.end))
        device = layers[0].weight.device
        kind = TritonPieces if device.type == "cuda" else ReferencePieces
        self._pieces = kind(pieces, len(self._scales.count), device)
        self._codes = {
            by_weight[weight]: codes for bucket in self._buckets for weight, codes in bucket.of_weights.items()
        }
        self._in_bf16: dict[QSparseLinearMixin, Expanded] = {}

    def gather(self, version: int) -> None:
        """All ranks' codes into the caches, in place: a CUDA graph of a step reads the same addresses for ever."""
        sums = self._pieces.sums()
        dist.all_reduce(sums, group=self._ranks)
        scale = self._scales.of(sums)
        pieces = self._pieces.codes(scale).split([bucket.num_mine for bucket in self._buckets])
        for bucket, codes in zip(self._buckets, pieces, strict=True):
            bucket.gather(codes)
        for layer, of_layer in self._scales.by_layer(scale).items():
            codes = self._codes[layer]
            layer.cache.put(version, Operand(codes, of_layer, self._expanded(layer, codes, of_layer)))

    def _expanded(self, layer: QSparseLinearMixin, codes: Tensor, scale: Tensor) -> Expanded | None:
        """What the layer's exact backward pass multiplies by, where that is kept."""
        if layer.expander is None:
            return None
        found = layer.expander.expand(codes, scale.flatten())
        kept = self._in_bf16.setdefault(layer, found)
        if kept is not found:
            kept.values.copy_(found.values)
            kept.scale.copy_(found.scale)
        return kept


class _Scales:
    """Scales of several layers, one after the other; those of one tensor-parallel group are neighbours.

    Args:
        layers: ternary, on one device.
    """

    def __init__(self, layers: list[QSparseLinearMixin]) -> None:
        groups = dict.fromkeys(layer.tp_group for layer in layers)
        self._layers = [layer for group in groups for layer in layers if layer.tp_group is group]
        sizes = [num_scales(layer) for layer in self._layers]
        self.first = dict(zip(self._layers, accumulate(sizes, initial=0), strict=False))
        """Number of each layer's first scale."""
        self._of_groups = {group: sum(num_scales(x) for x in layers if x.tp_group is group) for group in groups}
        of_rows = [scale_of_row(layer) for layer in self._layers]
        counts = [
            torch.bincount(rows) * layer.weight.shape[1] * group_size(layer.tp_group)
            for rows, layer in zip(of_rows, self._layers, strict=True)
        ]
        device = layers[0].weight.device
        self.count = torch.cat(counts).to(device)
        """[scales] elements that each is the mean of, over all ranks."""
        numbered = [rows + self.first[layer] for rows, layer in zip(of_rows, self._layers, strict=True)]
        self._of_rows = torch.cat(numbered).to(device)
        self._row_scales = torch.empty(len(self._of_rows), dtype=torch.float32, device=device)

    def of(self, sums: Tensor) -> Tensor:
        """float32 [scales] from sums of |W| over all data-parallel ranks, which tensor-parallel ranks add up."""
        for group, part in zip(self._of_groups, sums.split(list(self._of_groups.values())), strict=True):
            if group_size(group) > 1:
                dist.all_reduce(part, group=group)
        return reference.absmean_scale(sums, self.count)

    def by_layer(self, scale: Tensor) -> dict[QSparseLinearMixin, Tensor]:
        """For each layer [1], or [O, 1] if its weight has several, always at the same address."""
        torch.index_select(scale, 0, self._of_rows, out=self._row_scales)
        rows = self._row_scales.split([layer.weight.shape[0] for layer in self._layers])
        return {
            layer: of_rows[:1] if num_scales(layer) == 1 else of_rows.unsqueeze(-1)
            for layer, of_rows in zip(self._layers, rows, strict=True)
        }


class _BucketCodes:
    """The codes of one bucket and how they travel.

    Args:
        ranks: that share it.
        shards: what each rank updates of the ternary weights, in order.
    """

    def __init__(self, ranks: dist.ProcessGroup, shards: list[list[Run]]) -> None:
        self._ranks = ranks
        counts = [sum(map(len, runs)) for runs in shards]
        self.num_mine = counts[ranks.rank()]
        """Codes that this rank makes."""
        weights = list(dict.fromkeys(run.parameter for runs in shards for run in runs))
        self._messages = CodeMessages(counts, weights[0].device)
        self._codes = torch.empty(sum(counts), dtype=torch.int8, device=weights[0].device)
        split = self._codes.split([weight.numel() for weight in weights])
        self.of_weights = {weight: codes.view_as(weight) for weight, codes in zip(weights, split, strict=True)}
        """Views of the codes, in the shape of their weight."""

    def gather(self, codes: Tensor) -> None:
        """All ranks' codes, from this rank's int8 [num_mine]; collective."""
        message = self._messages.pack(codes)
        messages = message.new_empty(self._ranks.size() * message.numel())
        dist.all_gather_into_tensor(messages, message, group=self._ranks)
        self._messages.unpack(messages.view(self._ranks.size(), -1), self._codes)
