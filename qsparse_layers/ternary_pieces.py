"""Ternary codes of weights of which this rank keeps only pieces up to date: runs of elements of the flattened matrix.

A distributed optimizer updates on each rank a piece of the parameters, cut without regard to rows.  The scale of a
weight is a mean over all of it, so a rank can make codes of its pieces in two steps,

    sums of |W| per part over its pieces   ->   (summed over ranks by the caller)   ->   codes with the common scale

A piece is a row's end, whole rows and a row's beginning, hence at most three matrices; each row belongs to a part of
its weight (`linear_call.WeightParts`).  On a GPU these matrices are what `kernels.ternarize` does in three launches.

Sums are float64, those of a weight cut at other places differ in the last bit of that and then agree as float32
scales, but for one sum in some 10^8 that lies on a rounding boundary.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from qsparse_layers.parallel import QSparseLinearMixin


def num_scales(layer: QSparseLinearMixin) -> int:
    """Scales of a layer's weight: one, or one per part."""
    return 1 if layer.format.ternary_scale == "matrix" else len(layer.parts.sizes)


def scale_of_row(layer: QSparseLinearMixin) -> Tensor:
    """int64 [O]: which of its weight's scales a row has."""
    part_of_row = layer.parts.expand(torch.arange(len(layer.parts.sizes)))
    return part_of_row if num_scales(layer) > 1 else torch.zeros_like(part_of_row)


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `end` of a flattened weight."""

    layer: QSparseLinearMixin
    first_scale: int
    """Number of the weight's first scale among those of all weights."""
    start: int
    end: int

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Views of the weight, in order, each with the scale [rows] (among all) of its rows."""
        weight = self.layer.weight.detach()
        width = weight.shape[1]
        scales = scale_of_row(self.layer) + self.first_scale
        first_whole, last_whole = -(-self.start // width), self.end // width
        if first_whole > last_whole:  # inside one row
            bounds = [self.start, self.end]
        else:
            bounds = [self.start, first_whole * width, last_whole * width, self.end]
        found = []
        for start, end in pairwise(bounds):
            if start < end:
                rows = slice(start // width, -(-end // width))
                found.append((weight.view(-1)[start:end].view(rows.stop - rows.start, -1), scales[rows]))
        return found


class ReferencePieces:
    """Sums and codes of pieces in plain PyTorch.

    Args:
        pieces: of this rank; the codes come in their order.
        scale_count: of all weights, also of those without a piece here.
        device: of the weights.
    """

    def __init__(self, pieces: Sequence[Piece], scale_count: int, device: torch.device) -> None:
        matrices = [found for piece in pieces for found in piece.matrices()]
        self._matrices = [(matrix, scales.to(device)) for matrix, scales in matrices]
        self._scale_count, self._device = scale_count, device

    def sums(self) -> Tensor:
        """float64 [scales]: sums of |W|, 0 where there is no piece."""
        total = torch.zeros(self._scale_count, dtype=torch.float64, device=self._device)
        for matrix, scales in self._matrices:
            total.index_add_(0, scales, matrix.abs().sum(dim=1, dtype=torch.float64))
        return total

    def codes(self, scale: Tensor) -> Tensor:
        """int8 codes of all pieces, one after the other; `scale` float32 [scales]."""
        found = [reference.ternary_codes(m, scale[scales].unsqueeze(1)).flatten() for m, scales in self._matrices]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int8, device=self._device)


class TritonPieces:
    """The same in three launches, bit for bit but for the order of sums; arguments as for `ReferencePieces`."""

    def __init__(self, pieces: Sequence[Piece], scale_count: int, device: torch.device) -> None:
        self._kernels: Any = importlib.import_module("kernels.ternarize")
        matrices = [found for piece in pieces for found in piece.matrices()]
        self._empty = not matrices
        if self._empty:
            matrices = [(torch.zeros(1, 1, device=device), torch.zeros(1, dtype=torch.int64))]
        self._matrices = [matrix for matrix, _ in matrices]
        """The table has addresses only."""
        # The kernels number the parts of each matrix from 0.
        used = [scales.unique(return_inverse=True) for _, scales in matrices]
        self._dtype = self._matrices[0].dtype
        self._table = self._kernels.row_table(self._matrices, [local for _, local in used])
        scale_of_part = torch.cat([numbers for numbers, _ in used])
        self._scale_of_part = scale_of_part.to(device)
        self._parts_of_scale = _inverse(scale_of_part, scale_count).to(device)

    def sums(self) -> Tensor:
        """See `ReferencePieces.sums`; a scale's parts are added in a fixed order."""
        sums = torch.nn.functional.pad(self._kernels.part_sums(self._table, self._dtype), (0, 1))
        return sums[self._parts_of_scale].sum(dim=1)

    def codes(self, scale: Tensor) -> Tensor:
        """See `ReferencePieces.codes`."""
        codes: Tensor = self._kernels.codes(self._table, scale[self._scale_of_part], self._dtype)
        return codes[:0] if self._empty else codes


def _inverse(scale_of_part: Tensor, scale_count: int) -> Tensor:
    """[scales, most parts of a scale]: the parts of each scale, and the number of all parts where there are no more."""
    parts: list[list[int]] = [[] for _ in range(scale_count)]
    for part, scale in enumerate(scale_of_part.tolist()):
        parts[scale].append(part)
    most = max(map(len, parts))
    return torch.tensor([found + [len(scale_of_part)] * (most - len(found)) for found in parts])
