"""Forward and backward of a whole step as one CUDA graph: the launches of thousands of kernels cost no CPU time.

A step of a 1.3B model at micro-batch 4 launches about 5,000 kernels, and Python needs longer to launch a Triton kernel
than the GPU needs to run it.  Captured once, the step is one launch.  Everything a step reads must then stay where it
is: tokens are copied into a fixed buffer, and ternary codes are refreshed in place (`qsparse_layers.ternary`).

A graph repeats what it saw, so it is captured anew when the strength of a warm-up, the number of microbatches or their
shape changes, and steps that count zeros run without it.  Not for steps whose work depends on the data (mixture of
experts, attention by document) nor for pipelines; `pipeline.config_checks` says so.
"""

from collections.abc import Callable, Hashable

import torch
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch import Tensor

EAGER_STEPS = 2
"""Steps run before the capture: kernels are compiled and tuned, buffers of libraries allocated."""


class StepGraph:
    """Runs `step` eagerly at first, then from a graph.

    Args:
        step: forward and backward over the microbatches of its argument, int64 [M, b, s + 1]; returns their losses.
    """

    def __init__(self, step: Callable[[Tensor], list[Tensor]]) -> None:
        self._step = step
        self._key: Hashable = None
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens = torch.empty(0)
        self._losses: list[Tensor] = []

    def run(self, tokens: Tensor, strength: Hashable) -> list[Tensor]:
        """One step.

        Args:
            tokens: int64 [M, b, s + 1].
            strength: what else the step depends on that is no tensor; a new graph is captured when it changes.
        """
        key = (strength, tuple(tokens.shape))
        if key != self._key:
            self._key, self._eager_steps, self._graph = key, 0, None
        if self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            return self._step(tokens)
        if self._graph is None:
            self._graph = self._capture(tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return [loss.clone() for loss in self._losses]

    def close(self) -> None:
        """Let go of the graph: a process group cannot be taken down while a graph holds one of its collectives."""
        self._key = self._graph = None

    def _capture(self, tokens: Tensor) -> torch.cuda.CUDAGraph:
        self._tokens = tokens.clone()
        graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        torch.cuda.synchronize()
        # Other threads (data, tracking) go on calling CUDA while this one captures.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._losses = self._step(self._tokens)
        return graph
