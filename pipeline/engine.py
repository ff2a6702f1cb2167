"""The model under megatron-core's pipeline schedules: gradients of a step, held-out losses, or logits.

Every schedule (no pipeline, 1F1B, interleaved) wants a function that runs one microbatch through one model chunk and
returns what to do with the result; this module is that function, and the only place that calls a schedule.

Shapes: M microbatches of b sequences of s + 1 tokens (inputs and labels overlap by s - 1), all on one rank.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from pipeline.config import Config
from pipeline.model_inputs import Microbatch, ModelInputs
from pipeline.step_graph import StepGraph

Losses = list[Tensor]
"""One [b] tensor of sequence losses per microbatch on the last pipeline stage; empty elsewhere."""


class Engine:
    """Runs `chunks` (wrapped in data parallelism or not) over microbatches.

    Args:
        chunks: this rank's model chunks, in order.
        config: the run.
        eod_id: token that ends every document.
    """

    def __init__(self, chunks: list[Any], config: Config, eod_id: int | None = None) -> None:
        self.chunks = chunks
        self.config = config
        self.inputs = ModelInputs(config, eod_id)
        self._schedule = get_forward_backward_func()
        self._graph = StepGraph(self._whole_step)

    def train(
        self,
        tokens: Tensor | None,
        num_microbatches: int,
        seq_length: int | None = None,
        graph_key: Hashable | None = None,
    ) -> Losses:
        """Forward and backward over a step's microbatches; gradients end up reduced in the chunks.

        Args:
            tokens: int64 [M, b, s + 1] on first and last pipeline stages, else None.
            num_microbatches: M.
            seq_length: s, for stages without tokens; absent: `training.seq_length`.
            graph_key: run the step as a CUDA graph, which holds as long as this stays the same; None: without one.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        if graph_key is not None and tokens is not None:
            return self._graph.run(tokens, graph_key)
        weights = self.inputs.loss_weights(tokens)
        return self._run(_microbatches(tokens, weights, num_microbatches), self._mean_loss, seq_length=seq_length)

    def _whole_step(self, tokens: Tensor) -> Losses:
        """What a graph captures: all microbatches of a step, losses of equal weight."""
        return self._run(_microbatches(tokens, None, len(tokens)), self._mean_loss)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor | None, num_microbatches: int) -> Losses:
        """Losses without gradients, 0 where they are masked; arguments as for `train`."""
        for chunk in self.chunks:
            chunk.eval()
        microbatches = _microbatches(tokens, self.inputs.loss_mask(tokens), num_microbatches)
        return self._run(microbatches, self._mean_loss, forward_only=True)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one batch on every rank: int64 [b, s] -> float32 [b, s, padded vocabulary]."""
        for chunk in self.chunks:
            chunk.eval()
        parallel = self.config.parallel
        copies = parallel.pp if parallel.vpp > 1 else 1  # the interleaved schedule wants as many as there are stages
        results = self._run([Microbatch(tokens)] * copies, self._keep, forward_only=True, labels=False)
        shape = torch.zeros(3, dtype=torch.int64, device=tokens.device)
        local = _gather_vocabulary(results[0]).to(torch.float32) if results else None  # also of a float64 model
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        if local is not None:
            shape.copy_(torch.tensor(local.shape))
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(shape, source, group=group)
        logits = local if local is not None else torch.empty(shape.tolist(), device=tokens.device)
        dist.broadcast(logits, source, group=group)
        return logits

    def close(self) -> None:
        """No step follows."""
        self._graph.close()

    def _run(
        self,
        microbatches: list[Microbatch],
        reduce: Callable[[Microbatch, Tensor], tuple[Tensor, dict[str, Tensor]]],
        *,
        forward_only: bool = False,
        labels: bool = True,
        seq_length: int | None = None,
    ) -> Losses:
        def forward_step(iterator: Iterator[Microbatch], chunk: Module) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            return chunk(**self.inputs.arguments(batch.tokens_bs, labels=labels)), partial(reduce, batch)

        iterators = [iter(microbatches) for _ in self.chunks]
        single = len(self.chunks) == 1
        rows, width = self.config.training.micro_batch_size, seq_length or self.config.training.seq_length
        if (tokens := microbatches[0].tokens_bs) is not None:
            rows, width = tokens.shape[0], tokens.shape[1] - int(labels)
        packed = self.inputs.by_document
        results = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,
            num_microbatches=len(microbatches),
            seq_length=rows * width if packed else width,
            micro_batch_size=1 if packed else rows,
            forward_only=forward_only,
        )
        return [result["value"] for result in results]

    def _mean_loss(self, batch: Microbatch, loss_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over a microbatch for the backward pass, and the loss of each sequence for the books.

        The schedule multiplies by CP, because it expects a sum over the rank's tokens divided by all tokens.
        """
        assert batch.tokens_bs is not None
        loss_bs = self.inputs.unpack(loss_bs, batch.tokens_bs.shape[0])
        loss_bs = loss_bs.to(torch.promote_types(loss_bs.dtype, torch.float32))
        if batch.weights_bs is not None:
            loss_bs = loss_bs * self.inputs.slice_context(batch.weights_bs).to(loss_bs.dtype)
        return loss_bs.mean() / self.config.parallel.cp, {"value": loss_bs.detach().mean(dim=1)}

    def _keep(self, batch: Microbatch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.tokens_bs is not None
        logits = self.inputs.unpack(logits, batch.tokens_bs.shape[0])
        return logits.float().mean(), {"value": logits.detach().float()}


def _microbatches(tokens: Tensor | None, weights: Tensor | None, count: int) -> list[Microbatch]:
    if tokens is None:
        return [Microbatch(None)] * count
    return [Microbatch(tokens[i], None if weights is None else weights[i]) for i in range(count)]


def _gather_vocabulary(logits: Tensor) -> Tensor:
    """[b, s, vocabulary / TP] on each tensor-parallel rank -> the whole vocabulary on all of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)
