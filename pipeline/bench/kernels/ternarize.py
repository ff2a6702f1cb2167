"""Ternary codes of all weights of a 1.3 B model, as after an optimizer step: against a loop of torch operations.

The scale of a matrix is its mean, so the weights are read twice: 2 x 2 bytes read and 1 written per bf16 weight is the
floor, as a copy that moves as many.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from kernels import reference, ternarize
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch
from pipeline.bench.kernels.drawing import of_floor, ratio_bars, ratio_table
from pipeline.bench.kernels.timing import Rates

HIDDEN, FFN = 2048, 5440
LAYERS = {"6 layers, 0.3 B weights": 6, "24 layers, 1.2 B weights": 24}
Function = Callable[[ternarize.RowTable, Tensor, torch.dtype], Tensor]


class TernarizeCase:
    """The fused matrices of `layers` transformer layers.

    Args:
        layers: how many.
        device: where.
        hidden: width of the model.
        ffn: width of each branch of its FFN.
        function: what writes the codes.
    """

    def __init__(
        self, layers: int, device: str, *, hidden: int = HIDDEN, ffn: int = FFN, function: Function = ternarize.codes
    ) -> None:
        torch.manual_seed(0)
        shapes = [(3, hidden, hidden), (1, hidden, hidden), (2, ffn, hidden), (1, hidden, ffn)] * layers
        self._weights = [
            (0.02 * torch.randn(parts * rows, features, device=device)).bfloat16() for parts, rows, features in shapes
        ]
        self._parts = [torch.arange(parts).repeat_interleave(rows) for parts, rows, _ in shapes]
        self._table = ternarize.row_table(self._weights, self._parts)
        self._function = function

    def _run(self) -> tuple[Tensor, Tensor]:
        sums = ternarize.part_sums(self._table, torch.bfloat16)
        scales = reference.absmean_scale(sums, self._table.part_size)
        return self._function(self._table, scales, torch.bfloat16), scales

    def checks(self) -> Iterator[Check]:
        """Codes equal the reference's, bit for bit."""
        flat, _ = self._run()
        codes = flat.split([weight.numel() for weight in self._weights])
        worst = 0.0
        for weight, parts, found in zip(self._weights, self._parts, codes, strict=True):
            pieces = weight.split(torch.bincount(parts).tolist())
            scales = [reference.absmean_scale(reference.absmean_sum(piece), piece.numel()) for piece in pieces]
            want = torch.cat([reference.ternary_codes(*pair) for pair in zip(pieces, scales, strict=True)])
            worst = max(worst, mismatch(found.view_as(weight), want))
        yield Check(f"codes of {len(codes)} matrices", worst, 0.0)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """All weights at once."""
        compiled = torch.compile(_ternary, dynamic=False)
        yield Contest(
            "all weights",
            {"ours": self._run},
            rivals={"torch eager": partial(self._loop, _ternary), "torch.compile": partial(self._loop, compiled)},
            baseline="torch eager",
            copy_bytes=5 * sum(weight.numel() for weight in self._weights),
        )

    def _loop(self, function: Callable[[Tensor], Tensor]) -> None:
        for weight, parts in zip(self._weights, self._parts, strict=True):
            for piece in weight.chunk(int(parts[-1]) + 1):
                function(piece)


def _ternary(weight: Tensor) -> Tensor:
    scale = weight.abs().mean(dtype=torch.float32).clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1).to(torch.int8)


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    names = list(LAYERS)[:1] if options.quick else list(LAYERS)
    return {name: partial(TernarizeCase, LAYERS[name], options.device) for name in names}


SECTION = Section(
    "Ternary codes of all weights (times a copy of the bytes that have to move)",
    cases=_cases,
    draw=ratio_bars(of_floor, "time over copy of the same bytes"),
    table=ratio_table(of_floor, "x"),
)
