"""What changes while a model trains and every layer has to know: the optimizer step, and the version of the weights.

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
        self.weight_version: int | None = None
        """Tells layers whether their ternary codes are still those of their weights; None: they keep none."""

    @property
    def strength(self) -> tuple[float, float]:
        """Progress of both warm-ups; the computation of a step is the same while it is."""
        return self.quantization, self._config.sparsity_warmup.fraction(self.step)

    def weights_changed(self) -> int:
        """The weights are others now; returns their version.  From the first call on layers keep their codes."""
        self.weight_version = (self.weight_version or 0) + 1
        return self.weight_version

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
