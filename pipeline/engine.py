"""The model under megatron-core's pipeline schedules: gradients of a step, held-out losses, or logits.

Every schedule (no pipeline, 1F1B, interleaved) wants a function that runs one microbatch through one model chunk and
returns what to do with the result; this module is that function, and the only place that calls a schedule.

Shapes: M microbatches of b sequences of s + 1 tokens (inputs and labels overlap by s - 1), all on one rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from pipeline.config import Config

Losses = list[Tensor]
"""One [b] tensor of sequence losses per microbatch on the last pipeline stage; empty elsewhere."""


class Engine:
    """Runs `chunks` (wrapped in data parallelism or not) over microbatches.

    Args:
        chunks: this rank's model chunks, in order.
        config: the run.
    """

    def __init__(self, chunks: list[Any], config: Config) -> None:
        self.chunks = chunks
        self.config = config
        self._schedule = get_forward_backward_func()

    def train(self, tokens: Tensor | None, num_microbatches: int) -> Losses:
        """Forward and backward over a step's microbatches; gradients end up reduced in the chunks.

        Args:
            tokens: int64 [M, b, s + 1] on first and last pipeline stages, else None.
            num_microbatches: M.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        return self._run(tokens, num_microbatches, self._mean_loss, forward_only=False)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor | None, num_microbatches: int) -> Losses:
        """Losses without gradients; arguments as for `train`."""
        for chunk in self.chunks:
            chunk.eval()
        return self._run(tokens, num_microbatches, self._mean_loss, forward_only=True)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one batch on every rank: int64 [b, s] -> float32 [b, s, padded vocabulary]."""
        for chunk in self.chunks:
            chunk.eval()
        results = self._run(tokens.unsqueeze(0), 1, _keep, forward_only=True, labels=False)
        shape = torch.zeros(3, dtype=torch.int64, device=tokens.device)
        local = _gather_vocabulary(results[0]) if results else None
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        if local is not None:
            shape.copy_(torch.tensor(local.shape))
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(shape, source, group=group)
        logits = local if local is not None else torch.empty(shape.tolist(), device=tokens.device)
        dist.broadcast(logits, source, group=group)
        return logits

    def _run(
        self,
        tokens: Tensor | None,
        num_microbatches: int,
        reduce: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
        *,
        forward_only: bool,
        labels: bool = True,
    ) -> Losses:
        microbatches = [None] * num_microbatches if tokens is None else list(tokens)

        def forward_step(iterator: Iterator[Tensor | None], chunk: Module) -> tuple[Tensor, Callable]:
            return chunk(**self._model_inputs(next(iterator), labels)), reduce

        iterators = [iter(microbatches) for _ in self.chunks]
        single = len(self.chunks) == 1
        width = self.config.training.seq_length if tokens is None else tokens.shape[-1] - int(labels)
        results = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,
            num_microbatches=num_microbatches,
            seq_length=width,
            micro_batch_size=self.config.training.micro_batch_size if tokens is None else tokens.shape[1],
            forward_only=forward_only,
        )
        return [result["value"] for result in results]

    def _model_inputs(self, tokens: Tensor | None, labels: bool) -> dict[str, Any]:
        """Arguments of GPTModel.forward; a middle pipeline stage gets its input from its neighbour."""
        if tokens is None:
            return {"input_ids": None, "position_ids": None, "attention_mask": None}
        inputs = tokens[:, :-1] if labels else tokens
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
        batch = {"input_ids": inputs.contiguous(), "position_ids": positions.contiguous()}
        if labels:
            batch["labels"] = tokens[:, 1:].contiguous()
        return {**{name: self._slice_context(value) for name, value in batch.items()}, "attention_mask": None}

    def _slice_context(self, tokens_bs: Tensor) -> Tensor:
        """This context-parallel rank's share of the sequence: chunks r and 2 CP - 1 - r of 2 CP, equal causal work."""
        size = self.config.parallel.cp
        if size == 1:
            return tokens_bs
        rank = parallel_state.get_context_parallel_rank()
        chunks = tokens_bs.chunk(2 * size, dim=1)
        return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)

    def _mean_loss(self, loss_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over a microbatch for the backward pass, and the loss of each sequence for the books.

        The schedule multiplies by CP, because it expects a sum over the rank's tokens divided by all tokens.
        """
        loss_bs = loss_bs.to(torch.promote_types(loss_bs.dtype, torch.float32))
        return loss_bs.mean() / self.config.parallel.cp, {"value": loss_bs.detach().mean(dim=1)}


def _keep(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return logits.float().mean(), {"value": logits.detach().float()}


def _gather_vocabulary(logits: Tensor) -> Tensor:
    """[b, s, vocabulary / TP] on each tensor-parallel rank -> the whole vocabulary on all of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)
