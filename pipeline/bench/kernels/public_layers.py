"""One linear layer, forward and backward, against the layers of torchao that train with 8-bit products.

They are the public kernels that come closest: a BitNet b1.58 layer (ternary weights, int8 activations, gradients in
bf16; what `ours exact` does without its sparsity), and INT8 mixed precision (all three products in int8; in place of
`ours fast`, whose gradients are e4m3).  Both are prototypes of torchao, compiled by torch.compile and tuned by Triton's
autotuner on first use, which takes longer than all measurements.
"""

# ruff: noqa: E741 - O is a dimension
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar

from pipeline.bench.kernels import naive
from pipeline.bench.kernels.case import Case, Contest, Options, Section
from pipeline.bench.kernels.drawing import ratio_bars, ratio_table, speedup
from pipeline.bench.kernels.layer import DENSE, SHAPES, TOKENS, LayerCase, Maker
from pipeline.bench.kernels.layer_report import WHOLE
from pipeline.bench.kernels.timing import Rates


class PublicCase(LayerCase):
    """The layers of `LayerCase` and those of torchao."""

    makers: ClassVar[Mapping[str, Maker]] = {"torchao BitNet": naive.torchao_bitnet, "torchao INT8": naive.torchao_int8}

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """Whole layers."""
        ours = {name: self.train(layer) for name, layer in self.layers().items() if name != "naive"}
        yield Contest(WHOLE, ours, rivals=self.libraries(), baseline=DENSE, floors=self.floors(rates))


def _cases(options: Options) -> Mapping[str, Callable[[], Case]]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    return {f"{D} -> {O}": partial(PublicCase, D, O, TOKENS, options.device) for D, O in shapes}


SECTION = Section(
    f"One linear layer and torchao's, {TOKENS} tokens (speed-up over dense bf16)",
    cases=_cases,
    draw=ratio_bars(speedup, "speed-up over dense bf16"),
    table=ratio_table(speedup, "x"),
)
