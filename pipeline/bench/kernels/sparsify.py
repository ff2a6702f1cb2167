"""Activations to sparse int8 codes in one pass: against a copy of the same bytes, torch eager and torch.compile.

A kernel that reads bf16 and writes int8 moves 3 bytes per element; the scale of each token adds 4.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.sparsify import sparsify
from pipeline.bench.kernels.case import Case, Check, Contest, Options, Section, mismatch
from pipeline.bench.kernels.drawing import of_floor, ratio_bars, ratio_table
from pipeline.bench.kernels.naive import fake_quantize_input
from pipeline.bench.kernels.timing import Call, Rates

ELEMENTS = 2**26
FEATURES = (2048, 4096, 8192, 14336, 16384)
COMPILED_FEATURES = (4096,)
"""Rows for which the naive chain is compiled too: compiling takes longer than measuring."""
CHECKED_ROWS = 2048

Function = Callable[[Tensor, int | None, int | None], tuple[Tensor, Tensor]]


class Pattern(NamedTuple):
    """`kept` of every `block` features; of the row if `block` is None."""

    kept: int | None
    block: int | None


class SparsifyCase:
    """Rows of `features` normal values.

    Args:
        tokens: rows.
        features: D.
        device: where.
        compiled: time the compiled chain, too.
        function: what is measured.
    """

    def __init__(
        self, tokens: int, features: int, device: str, *, compiled: bool = False, function: Function = sparsify
    ) -> None:
        torch.manual_seed(0)
        self._x = torch.randn(tokens, features, device=device).bfloat16()
        self._function, self._compiled = function, compiled
        self._patterns = {
            "top-k 50%": Pattern(features // 2, None),
            "16:32": Pattern(16, 32),
            "2:4": Pattern(2, 4),
            "quantize only": Pattern(None, None),
        }

    def checks(self) -> Iterator[Check]:
        """Codes and scales equal the reference's, bit for bit."""
        x = self._x[:CHECKED_ROWS]
        scale = reference.row_scale(x.abs().amax(-1, keepdim=True))
        dense = reference.absmax_codes(x, scale)
        for name, (kept, block) in self._patterns.items():
            want = dense
            if kept is not None:
                mask = reference.topk_mask(dense, kept)
                if block is not None:
                    mask = reference.block_mask(dense, kept, block)
                want = reference.apply_mask(dense, mask)
            codes, found_scale = self._function(self._x, kept, block)
            yield Check(f"codes, {name}", mismatch(codes[:CHECKED_ROWS], want), 0.0)
            yield Check(f"scales, {name}", mismatch(found_scale[:CHECKED_ROWS], scale), 0.0)

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """One per pattern."""
        for name, (kept, block) in self._patterns.items():
            rivals: dict[str, Call] = {"torch eager": self._naive(fake_quantize_input, kept, block)}
            if self._compiled:
                compiled = torch.compile(fake_quantize_input, dynamic=False)
                rivals["torch.compile"] = self._naive(compiled, kept, block)
            yield Contest(
                name,
                {"ours": partial(self._function, self._x, kept, block)},
                rivals=rivals,
                baseline="torch eager",
                copy_bytes=3 * self._x.numel() + 4 * len(self._x),
            )

    def _naive(self, function: Callable[..., Tensor], kept: int | None, block: int | None) -> Call:
        def run() -> Tensor:
            with torch.no_grad():
                return function(self._x, kept, block)

        return run


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    features = FEATURES[1:2] if options.quick else FEATURES
    return {
        f"D={number}": partial(
            SparsifyCase,
            ELEMENTS // number,
            number,
            options.device,
            compiled=number in COMPILED_FEATURES and not options.quick,
        )
        for number in features
    }


SECTION = Section(
    "Sparsify and quantize, 64 M activations (times a copy of the same bytes)",
    cases=_cases,
    draw=ratio_bars(of_floor, "time over copy of the same bytes", logarithmic=True),
    table=ratio_table(of_floor, "x"),
)
