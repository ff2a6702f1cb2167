"""Model, optimizer and data of a run, and its two verbs: take one optimizer step, measure the held-out loss.

Everything that decides the numbers of a run is here and in what it calls; files, tracking and signals are the
trainer's.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from pipeline.batches import BatchReader, Windows, samples_of_rank
from pipeline.config import Config
from pipeline.engine import Engine, Losses
from pipeline.errors import AgreedError
from pipeline.model import build_model
from pipeline.optim import build_optimizer, set_step, wrap_data_parallel
from pipeline.world import World, raise_together

SAMPLES_NAMED = 8
"""Samples per rank that the message about a non-finite loss names."""


class NonFiniteError(AgreedError):
    """Loss, gradient norm or weights are not numbers; names step, rank and samples."""


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
    stop_requested: bool
    """True if any rank asked to stop."""


class Learner:
    """A model in training on this rank; every method is collective.

    Args:
        config: the run.
        world: this process's place in the layout.
        train_data: endless stream of training windows.
        vocab_size: token ids of the dataset's tokenizer.
    """

    def __init__(self, config: Config, world: World, train_data: Windows, vocab_size: int) -> None:
        self.config, self.world = config, world
        self.model = build_model(config, vocab_size)
        self.chunks = wrap_data_parallel(self.model, config)
        self.optimizer = build_optimizer(self.model, self.chunks, config)
        self.engine = Engine(self.chunks, config)
        self.reader = BatchReader(train_data, world, config.training.seq_length)
        self._first_sample = 0

    def continue_from(self, step: int, consumed_samples: int) -> None:
        """Go on with the first sample not yet trained on, also if the global batch size was another one before."""
        self._first_sample = consumed_samples - step * self.config.training.global_batch_size

    def consumed_samples(self, step: int) -> int:
        """Sequences trained on after `step` optimizer steps."""
        return self._first_sample + step * self.config.training.global_batch_size

    def step(self, step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step on the next G = global_batch_size samples.

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
        count = training.global_batch_size // (training.micro_batch_size * self.world.dp_size)
        first = self.consumed_samples(step)
        samples = samples_of_rank(first, count, training.micro_batch_size, self.world.dp_rank, self.world.dp_size)
        self.optimizer.zero_grad()
        losses = self.engine.train(self.reader.read(samples, training.micro_batch_size), count)
        loss, stop_requested = self._share(losses, self.reader, stop)
        self._check_finite("loss", loss, losses, samples, step)
        lr, decay = set_step(self.optimizer, step, self.config)
        _, grad_norm, _ = self.optimizer.step()
        self._check_finite("gradient norm", float(grad_norm), losses, samples, step)
        return StepResult(loss, float(grad_norm), lr, decay, self.consumed_samples(step + 1), stop_requested)

    def evaluate(self, data: Windows) -> float:
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
        reader = BatchReader(data, world, training.seq_length)
        tokens = reader.read([sample % training.eval_sequences for sample in samples], training.micro_batch_size)
        losses = self.engine.evaluate(tokens, rounds)
        total: Tensor | float = 0.0
        if losses and world.tp_rank == 0:
            total = (torch.cat(losses).double() * weights.to(world.device)).sum() / self.config.parallel.cp
        return self._sum(reader, total)[0] / training.eval_sequences

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
        shared = torch.zeros(len(values) + 1, dtype=torch.float64, device=self.world.device)
        for index, value in enumerate((*values, float(reader.problem is not None))):
            shared[index] = value
        dist.all_reduce(shared)
        *sums, problems = shared.tolist()
        if problems:
            raise_together(reader.problem)
        return sums

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
