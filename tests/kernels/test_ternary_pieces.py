"""Sums and codes of weights cut anywhere, against those of whole weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import reference
from qsparse_layers.config import LinearFormat
from qsparse_layers.linear_call import WeightParts
from qsparse_layers.ternary_pieces import Piece, ReferencePieces, TritonPieces, num_scales, scale_of_row

CUTS = [0, 3, 24, 80, 81, 120, 240]  # inside a row, at its end, over several
QKV = WeightParts(groups=2, sizes=(3, 1, 2))
PLAIN = WeightParts(groups=1, sizes=(7,))


def layer(rows: int, width: int, parts: WeightParts, device: str, **given: Any) -> Any:
    """What pieces look at."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) * 0.02
    return SimpleNamespace(
        weight=weight.bfloat16().to(device), parts=parts, format=LinearFormat(weights="ternary", **given)
    )


def whole(layers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of all scales, and codes with scales that sum to those."""
    sums, codes = [], []
    for one in layers:
        rows = scale_of_row(one).to(one.weight.device)
        of_layer = [reference.absmean_sum(one.weight[rows == scale]) for scale in range(num_scales(one))]
        counts = torch.bincount(rows) * one.weight.shape[1]
        scale = reference.absmean_scale(torch.stack(of_layer), counts)
        sums += of_layer
        codes.append(reference.ternary_codes(one.weight, scale[rows].unsqueeze(1)).flatten())
    return torch.stack(sums), torch.cat(codes)


@pytest.mark.parametrize("kind", [ReferencePieces, TritonPieces])
def test_pieces_of_all_ranks_make_the_whole(kind: type, device: str) -> None:
    layers = [
        layer(12, 20, QKV, device),
        layer(7, 33, PLAIN, device),
        layer(12, 11, QKV, device, ternary_scale="matrix"),
    ]
    first = [0, 3, 4]
    cuts = [sorted({cut for cut in CUTS if cut < one.weight.numel()} | {one.weight.numel()}) for one in layers]
    ranks = []
    for number in range(len(CUTS) - 1):  # the last ones have nothing of the smaller layers
        found = [
            Piece(one, of_layer, *ends[number : number + 2])
            for one, of_layer, ends in zip(layers, first, cuts, strict=True)
            if len(ends) > number + 1
        ]
        ranks.append((found, kind(found, 5, torch.device(device))))
    expected_sums, expected = whole(layers)
    sums = torch.stack([pieces.sums() for _, pieces in ranks]).sum(0)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-14, atol=0)
    counts = torch.cat([torch.bincount(scale_of_row(one)) * one.weight.shape[1] for one in layers]).to(device)
    scale = reference.absmean_scale(sums, counts)
    starts = dict(zip(first, [0, 240, 240 + 231], strict=True))
    out = torch.full_like(expected, 99)
    for found, pieces in ranks:
        codes = pieces.codes(scale).split([piece.end - piece.start for piece in found])
        for piece, of_piece in zip(found, codes, strict=True):
            start = starts[piece.first_scale]
            out[start + piece.start : start + piece.end] = of_piece
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", [ReferencePieces, TritonPieces])
def test_a_rank_without_ternary_weights_adds_nothing(kind: type, device: str) -> None:
    pieces = kind([], 3, torch.device(device))
    assert pieces.sums().tolist() == [0.0, 0.0, 0.0]
    assert pieces.codes(torch.ones(3, device=device)).numel() == 0
