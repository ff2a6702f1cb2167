"""Model, optimizer and data of a run, and its two verbs: take one optimizer step, measure the held-out loss.

Everything that decides the numbers of a run is here and in what it calls; files, tracking and signals are the
trainer's.
"""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from pipeline.batches import BatchReader, Windows, samples_of_rank
from pipeline.config import Config
from pipeline.data.bad_chunks import BadChunk, BadChunks
from pipeline.data.phases import resolve_phases
from pipeline.engine import Engine, Losses
from pipeline.errors import NonFiniteError
from pipeline.model import Model, build_model, uses_triton
from pipeline.optim import build_optimizer, set_step, wrap_data_parallel
from pipeline.ternary_gather import TernaryGather
from pipeline.world import World, raise_together

SAMPLES_NAMED = 8
"""Samples per rank that the message about a non-finite loss names."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float
    """Mean loss of the global batch, nats per token."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    lr: float
    weight_decay: float
    consumed_samples: int
    """Sequences trained on so far, this step included."""
    consumed_tokens: int
    """Tokens of these sequences."""
    stop_requested: bool
    """True if any rank asked to stop."""


class Learner:
    """A model in training on this rank; every method is collective.

    Args:
        config: the run.
        world: this process's place in the layout.
        train_data: endless stream of training windows; None on ranks that do not read.
        vocab_size: token ids of the dataset's tokenizer.
        eod_id: token that ends every document.
        bad_chunks: where the datasets note chunks that they go around; absent: they do not.
        model: to train instead of the one that `config` describes, for comparisons.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        train_data: Windows | None,
        vocab_size: int,
        *,
        eod_id: int | None = None,
        bad_chunks: BadChunks | None = None,
        model: Model | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.model = model or build_model(config, vocab_size)
        self.chunks = wrap_data_parallel(self.model, config)
        self.optimizer = build_optimizer(self.model, self.chunks, config)
        self.engine = Engine(self.chunks, config, eod_id)
        self.phases = resolve_phases(config)
        self.reader = BatchReader(train_data, world, config, self.phases)
        self.bad_chunks = bad_chunks
        self.news: list[BadChunk] = []
        """Chunks that any rank found to be bad, for whoever tells of them and empties the list."""
        self._ternary: Any = None
        self._gather = TernaryGather(self.model, self.chunks) if config.parallel.ternary_param_gather else None
        self.consumed_samples = 0
        """Sequences trained on so far."""

    def continue_from(self, step: int, consumed_samples: int) -> None:
        """Go on with the first sample not yet trained on, also if the global batch size was another one before.

        Until the next step the schedules stand where the step that made the weights left them, for an evaluation.
        """
        self.consumed_samples = consumed_samples
        self.model.schedule.step = max(0, step - 1)

    def step(self, step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step on the next global batch of samples.

        Args:
            step: optimizer steps done before this one.
            stop: this rank wants the run to stop after the step.

        Raises:
            UserError: a rank could not read its samples; the weights are still good.
            NonFiniteError: loss or gradient norm is not finite; if it is the loss, the weights are still good.
        """
        training = self.config.training
        self.model.schedule.step = step
        if self.config.model.dropout:  # random state is a function of the step, so a resume needs none saved
            tensor_parallel.model_parallel_cuda_manual_seed(self.config.run.seed + step, force_reset_rng=True)
        if self._gather is not None and self.model.schedule.weight_version is None:
            self._weights_changed()  # so that a resumed run makes its codes as the uninterrupted one did
        plan = self.reader.plan(self.consumed_samples)
        self.optimizer.zero_grad()
        count = len(plan.samples) // training.micro_batch_size
        losses = self.engine.train(self.reader.step(plan), count, plan.seq_length, self._graph_key())
        loss, stop_requested = self._share(losses, self.reader, stop)
        self._check_finite("loss", loss, losses, plan.samples, step)
        lr, decay = set_step(self.optimizer, step, self.config)
        _, grad_norm, _ = self.optimizer.step()
        self._weights_changed()
        self._check_finite("gradient norm", float(grad_norm), losses, plan.samples, step)
        self.consumed_samples += self.phases.at(plan.first).global_batch_size
        return StepResult(
            *(loss, float(grad_norm), lr, decay),
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.phases.tokens(self.consumed_samples),
            stop_requested=stop_requested,
        )

    def evaluate(self, data: Windows | None) -> float:
        """Mean loss in nats per token over the first `training.eval_sequences` windows of `data`.

        Windows are spread over ranks; what is missing to a whole number of microbatches is read again and weighted 0,
        so that every layout measures the same sequences.

        Raises:
            UserError: a rank could not read its samples.
        """
        training, world = self.config.training, self.world
        per_round = training.micro_batch_size * world.dp_size
        rounds = math.ceil(training.eval_sequences / per_round)
        rounds = math.ceil(rounds / self.config.parallel.pp) * self.config.parallel.pp  # the interleaved schedule asks
        samples = samples_of_rank(0, rounds, training.micro_batch_size, world.dp_rank, world.dp_size)
        weights = torch.tensor([sample < training.eval_sequences for sample in samples], dtype=torch.float64)
        reader = BatchReader(data, world, self.config, self.phases)
        tokens = reader.read([sample % training.eval_sequences for sample in samples], training.seq_length)
        losses = self.engine.evaluate(tokens, rounds)
        mask = self.engine.inputs.loss_mask(tokens)
        total: Tensor | float = 0.0
        counted: Tensor | float = 0.0
        if losses and world.tp_rank == 0:
            weights = weights.to(world.device) / self.config.parallel.cp
            total = (torch.cat(losses).double() * weights).sum()
            counted = weights.sum() if mask is None else (mask.mean(dim=-1).flatten().double() * weights).sum()
        loss, weight = self._sum(reader, total, counted)
        return loss / weight

    def _graph_key(self) -> tuple[float, float] | None:
        """See `Engine.train`; the first step makes its codes itself, and layers that count their zeros need Python."""
        schedule = self.model.schedule
        if not self.config.run.cuda_graph or schedule.weight_version is None or schedule.counting:
            return None
        return schedule.strength

    def _weights_changed(self) -> None:
        """Let go of the old ternary codes; make new ones where ranks share that or one launch serves all layers."""
        version = self.model.schedule.weights_changed()
        if self._gather is not None:
            self._gather.refresh(version)
            return
        if not uses_triton(self.config) or self.config.parallel.overlap_param_gather:
            return
        if self._ternary is None:
            ternary = importlib.import_module("qsparse_layers.ternary")  # needs Triton
            self._ternary = ternary.TernaryWeights(layer.module for layer in self.model.layers)
        self._ternary.refresh(version)

    def check_weights(self, step: int) -> None:
        """Refuse weights that no checkpoint should hold: a finite loss can still come with an update to infinity.

        Raises:
            NonFiniteError: a weight is not finite.
        """
        finite = [parameter.isfinite().all() for chunk in self.chunks for parameter in chunk.parameters()]
        bad = (~torch.stack(finite)).any().double()
        dist.all_reduce(bad)
        if bad.item():
            raise NonFiniteError(
                f"weights are not finite after step {step} (optimizer.lr={self.config.optimizer.lr}), though the loss "
                "of that step was; they are not saved"
            )

    def close(self) -> None:
        """Stop reading ahead, and let go of what would keep the process group alive; no step follows."""
        self.reader.close()
        self.engine.close()

    def _share(self, losses: Losses, reader: BatchReader, stop: bool) -> tuple[float, bool]:
        """Mean loss of the global batch and whether anyone wants to stop, on all ranks, in one all-reduce."""
        mean: Tensor | float = 0.0
        if losses and self.world.tp_rank == 0:
            mean = torch.cat(losses).double().mean() / (self.world.dp_size * self.config.parallel.cp)
        loss, stops = self._sum(reader, mean, float(stop))
        return loss, stops > 0

    def _sum(self, reader: BatchReader, *values: Tensor | float) -> list[float]:
        """Sums over all ranks, and the news that a rank could not read, which costs no message of its own.

        Raises:
            UserError: a rank could not read; what and where.
        """
        news = self.bad_chunks is not None and self.bad_chunks.has_new
        shared = torch.zeros(len(values) + 2, dtype=torch.float64, device=self.world.device)
        for index, value in enumerate((*values, float(reader.problem is not None), float(news))):
            shared[index] = value
        dist.all_reduce(shared)
        *sums, problems, finders = shared.tolist()
        if problems:
            raise_together(reader.problem)
        if finders:
            self._share_bad_chunks()
        return sums

    def _share_bad_chunks(self) -> None:
        """A rank that learns of a bad chunk drops what it read ahead, so that all ranks go around it from here on."""
        assert self.bad_chunks is not None
        everyone: list[list[BadChunk]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, self.bad_chunks.take_new())
        found = {chunk[:3]: chunk for chunks in everyone for chunk in chunks}
        if self.bad_chunks.merge(found.values()):
            self.reader.forget_ahead()
        self.news += sorted(found.values())

    def _check_finite(self, what: str, value: float, losses: Losses, samples: list[int], step: int) -> None:
        if math.isfinite(value):
            return
        bad = torch.cat(losses).isfinite().logical_not().flatten().tolist() if losses else []
        mine = [sample for sample, is_bad in zip(samples, bad, strict=False) if is_bad and self.world.tp_rank == 0]
        everyone: list[list[int]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, mine)
        where = "; ".join(f"rank {rank}: samples {_shortened(found)}" for rank, found in enumerate(everyone) if found)
        raise NonFiniteError(
            f"{what} is {value} in step {step + 1}"
            + (f" ({where})" if where else "; the losses of all its samples are finite")
        )


def _shortened(samples: list[int]) -> str:
    named = ", ".join(map(str, samples[:SAMPLES_NAMED]))
    return named if len(samples) <= SAMPLES_NAMED else f"{named} and {len(samples) - SAMPLES_NAMED} more"
