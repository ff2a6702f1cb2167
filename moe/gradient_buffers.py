"""Where the weight gradients of a layer's experts are added, found once."""

from collections.abc import Sequence

from torch import Tensor

from kernels.gradient_table import GradientTable
from qsparse_layers.main_grad import main_grad_of


class GradientBuffers:
    """Float32 gradient buffers of megatron-core's data parallelism, of the weights of one kind."""

    def __init__(self) -> None:
        self._known: GradientTable | None = None

    def table(self, weights: Sequence[Tensor]) -> GradientTable | None:
        """The buffers that kernels can add to; None: gradients are returned."""
        found = [buffer for buffer in map(main_grad_of, weights) if buffer is not None]
        if len(found) < len(weights):
            return None
        known = self._known
        if known is None or any(new is not old for new, old in zip(found, known.buffers, strict=True)):
            self._known = known = GradientTable.of(found)
        return known if known.is_aligned else None
