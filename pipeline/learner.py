"""Model, optimizer and data of a run, and its two verbs: take one optimizer step, measure the held-out loss.

Everything that decides the numbers of a run is here and in what it calls; files, tracking and signals are the
trainer's.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from pipeline.batches import BatchReader, Windows, samples_of_rank
from pipeline.config import Config
from pipeline.engine import Engine, Losses
from pipeline.model import build_model
from pipeline.optim import build_optimizer, set_step, wrap_data_parallel
from pipeline.world import World


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not a number; names step, rank and samples."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank."""

    loss: float
    """Mean loss of the global batch, nats per token."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    lr: float
    weight_decay: float
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

    def step(self, step: int, *, stop: bool = False) -> StepResult:
        """One optimizer step on the samples [step G, (step + 1) G).

        Args:
            step: optimizer steps done before this one.
            stop: this rank wants the run to stop after the step.

        Raises:
            NonFiniteError: loss or gradient norm is not finite; if it is the loss, the weights are still good.
        """
        training = self.config.training
        self.model.schedule.step = step
        if self.config.model.dropout:  # random state is a function of the step, so a resume needs none saved
            tensor_parallel.model_parallel_cuda_manual_seed(self.config.run.seed + step, force_reset_rng=True)
        count = training.global_batch_size // (training.micro_batch_size * self.world.dp_size)
        first = step * training.global_batch_size
        samples = samples_of_rank(first, count, training.micro_batch_size, self.world.dp_rank, self.world.dp_size)
        self.optimizer.zero_grad()
        losses = self.engine.train(self.reader.read(samples, training.micro_batch_size), count)
        loss, stop_requested = self._share(losses, stop)
        self._check_finite("loss", loss, losses, samples, step)
        lr, decay = set_step(self.optimizer, step, self.config)
        _, grad_norm, _ = self.optimizer.step()
        self._check_finite("gradient norm", float(grad_norm), losses, samples, step)
        return StepResult(loss, float(grad_norm), lr, decay, stop_requested)

    def evaluate(self, data: Windows) -> float:
        """Mean loss in nats per token over the first `training.eval_sequences` windows of `data`.

        Windows are spread over ranks; what is missing to a whole number of microbatches is read again and weighted 0,
        so that every layout measures the same sequences.
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
        total = torch.zeros(1, dtype=torch.float64)
        if losses and world.tp_rank == 0:
            total += (torch.cat(losses).double().cpu() * weights).sum() / self.config.parallel.cp
        total = total.to(world.device)
        dist.all_reduce(total)
        return total.item() / training.eval_sequences

    def _share(self, losses: Losses, stop: bool) -> tuple[float, bool]:
        """Mean loss of the global batch and whether anyone wants to stop, on all ranks, in one all-reduce."""
        share = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        if losses and self.world.tp_rank == 0:
            share[0] = torch.cat(losses).double().mean() / (self.world.dp_size * self.config.parallel.cp)
        share[1] = float(stop)
        dist.all_reduce(share)
        loss, stops = share.tolist()
        return loss, stops > 0

    def _check_finite(self, what: str, value: float, losses: Losses, samples: list[int], step: int) -> None:
        if math.isfinite(value):
            return
        bad = torch.cat(losses).isfinite().logical_not().flatten().tolist() if losses else []
        mine = [sample for sample, is_bad in zip(samples, bad, strict=False) if is_bad]
        everyone: list[list[int]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, mine)
        where = "; ".join(f"rank {rank}: samples {found}" for rank, found in enumerate(everyone) if found)
        raise NonFiniteError(
            f"{what} is {value} at step {step}" + (f" ({where})" if where else "; the losses of all samples are finite")
        )
