"""Sizes of a layout and which layers each pipeline stage holds."""

from collections import Counter
from dataclasses import dataclass

from pipeline.config import Config


@dataclass(frozen=True)
class Layout:
    """A configuration on a number of GPUs; ranks are numbered TP first, then CP, DP, PP (megatron-core's order)."""

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    ep: int
    etp: int
    microbatches: int
    """Per replica and step."""
    tokens: int
    """Of one microbatch on one rank, before sequence parallelism."""
    sequence_parallel: bool

    @classmethod
    def of(cls, config: Config) -> "Layout":
        """The layout of `config`, whose `parallel.dp` is set."""
        parallel, training = config.parallel, config.training
        dp = parallel.dp or 1
        return cls(
            *(parallel.tp, parallel.pp, parallel.vpp, parallel.cp, dp, parallel.ep),
            etp=parallel.etp or parallel.tp,
            microbatches=training.global_batch_size // (training.micro_batch_size * dp),
            tokens=training.seq_length * training.micro_batch_size // parallel.cp,
            sequence_parallel=parallel.sequence_parallel,
        )

    @property
    def local_tokens(self) -> float:
        """Tokens of the residual stream on one rank."""
        return self.tokens / self.tp if self.sequence_parallel else self.tokens

    @property
    def replicas(self) -> int:
        """Ranks that share the optimizer state of dense parameters."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that share the optimizer state of experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.pp * self.cp * self.dp

    def stage(self, order: tuple[int, ...], stage: int) -> Counter[int]:
        """How many layers of each kind pipeline rank `stage` holds; of several chunks, every `pp`-th is its own."""
        size = len(order) // (self.pp * self.vpp)
        starts = [(chunk * self.pp + stage) * size for chunk in range(self.vpp)]
        return Counter(kind for start in starts for kind in order[start : start + size])

    def in_flight(self, stage: int) -> float:
        """Microbatches whose activations rank `stage` holds at most, in units of all its layers.

        1F1B: arXiv 2104.04473 sec. 2.2; interleaved: 2 (pp - stage - 1) + (vpp - 1) pp chunks of the warm-up, and the
        one that runs.
        """
        ahead = self.pp - stage - 1
        chunks = (2 * ahead + (self.vpp - 1) * self.pp if self.vpp > 1 else ahead) + 1
        return min(chunks, self.microbatches * self.vpp) / self.vpp
