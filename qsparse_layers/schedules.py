"""Warm-up of sparsity and quantization: the one number that changes while a model trains, its optimizer step.

The trainer owns one `Schedule`, hands it to every layer at build time and moves it before each step.  A model that
is only evaluated uses the step it was trained to, so a half-warmed checkpoint evaluates as it trained.
"""

from qsparse_layers.config import LinearFormat, QSparseConfig


class Schedule:
    """Current strength of sparsity and quantization."""

    def __init__(self, config: QSparseConfig, step: int = 0) -> None:
        self._config = config
        self.step = step
        self.counting = False
        """True while layers count their zeros."""

    @property
    def quantization(self) -> float:
        """lambda in x + lambda (q(x) - x), in [0, 1]."""
        return self._config.quantization_warmup.fraction(self.step)

    def sparsity(self, layout: LinearFormat) -> float:
        """Sparsity of a layer at this step; block patterns move in whole features of a block."""
        target = layout.sparsity * self._config.sparsity_warmup.fraction(self.step)
        if layout.pattern == "block" and target > 0.0:
            return int(target * layout.block_size + 1e-9) / layout.block_size
        return target
