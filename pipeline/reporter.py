"""What a run tells people and files, on rank 0; on every other rank the same calls do nothing.

Order matters: a record goes to metrics.jsonl first, then to the tracker's queue and to the console.
"""

import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from pipeline.batches import BatchReader
from pipeline.checkpoint import Progress
from pipeline.config import Config
from pipeline.config_layers import layer_formats
from pipeline.config_loader import differences, dump_config
from pipeline.console import RunConsole, Summary, perplexity
from pipeline.data.bad_chunks import BadChunk
from pipeline.data.phases import Phases, resolve_phases
from pipeline.environment import describe_environment
from pipeline.learner import StepResult
from pipeline.metrics import MetricsLog, layer_metric, read_metrics
from pipeline.model import uses_transformer_engine, uses_triton
from pipeline.ownership import describe
from pipeline.plan.search import memory_of_run
from pipeline.run_directory import RunDirectory, RunState
from pipeline.sizes import flops_per_token, model_size, peak_flops
from pipeline.start_screen import ParallelGrid, StartScreen, group_layers
from pipeline.system_metrics import SystemMetrics
from pipeline.tracking import STATUS_OF_STATE, make_tracker
from pipeline.world import World
from qsparse_layers.stats import LayerSparsity, model_sparsity


class Reporter:
    """Records one start of a run.

    Args:
        config: the run.
        world: this process's place in the layout; all ranks but 0 stay silent.
        directory: where everything goes.
        vocab_size: token ids of the tokenizer.
        progress: what was done before this start.

    Raises:
        ValueError: the run's folder, its metrics or the tracking URI cannot be used.
    """

    def __init__(
        self, config: Config, world: World, directory: RunDirectory, vocab_size: int, progress: Progress
    ) -> None:
        step = progress.step
        self.config, self.world, self.directory = config, world, directory
        self.vocab_size, self.first_step, self.step_done = vocab_size, step, step
        self._size = model_size(config, vocab_size)
        self._phases = resolve_phases(config)
        self._first_tokens = self._last_tokens = self._phases.tokens(progress.consumed_samples)
        self._started = self._last_time = time.perf_counter()
        self._last_step = step
        self._num_bad_chunks = len(progress.bad_chunks)
        self._val_loss: float | None = None
        self._sample = ""
        self._state: tuple[RunState, str] = ("failed", "the process ended without saying why")
        self._metrics: MetricsLog | None = None
        self._evaluated: set[int] = set()
        environment = _facts(world, vocab_size) if world.is_main else {}
        if world.is_main:
            directory.create(dump_config(config), environment)
            directory.write_status("running", step, "resumed" if step else "started")
            self._metrics = MetricsLog(directory.metrics)
            self._metrics.rewind(step)
            # A run killed in its last moments evaluates once more at a step that is already in the file.
            self._evaluated = {record["step"] for record in read_metrics(directory.metrics) if "val/loss" in record}
        self._tracker = make_tracker(config, directory, rank=world.rank, tags=environment)
        self._system = SystemMetrics(directory.path) if world.is_main and config.tracking.system_metrics else None
        self._console = RunConsole(config.training.steps, rank=world.rank, log_file=directory.log(0))

    def start(self, num_weights: Mapping[str, int], windows_per_epoch: int) -> None:
        """Print the start-up screen.

        Args:
            num_weights: weights of each projection, by path.
            windows_per_epoch: training windows of the dataset.
        """
        if self.world.is_main:
            self._console.start(self._screen(num_weights, windows_per_epoch))
            self._tracker.wait_ready()
        self._started = self._last_time = time.perf_counter()

    def is_logged(self, step: int) -> bool:
        """Whether the step that ends at `step` is recorded."""
        return step == 1 or step % self.config.tracking.log_interval == 0 or step == self.config.training.steps

    def advance(self, step: int) -> None:
        """Note that `step` optimizer steps are done."""
        self.step_done = step
        self._console.advance(step)

    def step(
        self,
        step: int,
        result: StepResult,
        layers: list[LayerSparsity],
        reader: BatchReader,
        load: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Record a logged step, the sparsity of its forward passes and the load of its experts; collective."""
        now = time.perf_counter()
        steps = max(1, step - self._last_step)
        seconds = (now - self._last_time) / steps
        waited, reader.wait_seconds = reader.wait_seconds / steps, 0.0
        self._last_time, self._last_step = now, step
        peak_bytes = _peak_bytes(self.world)
        if not self.world.is_main:
            return
        tokens_per_second = (result.consumed_tokens - self._last_tokens) / steps / seconds
        self._last_tokens = result.consumed_tokens
        sparsity, ternary_zeros = model_sparsity(layers)
        record = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "train/weight_decay": result.weight_decay,
            "train/tokens": float(result.consumed_tokens),
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens_per_second,
            "perf/data_wait_seconds": waited,
            "mem/peak_bytes": float(peak_bytes),
            "qsparse/sparsity": sparsity,
            "qsparse/ternary_zeros": ternary_zeros,
            "qsparse/activated_parameters": self._size.active_projections * (1 - sparsity),
            **self._utilization(tokens_per_second),
            **load,
        }
        for layer in layers:
            record[layer_metric(layer.path, "sparsity")] = layer.sparsity
            record[layer_metric(layer.path, "ternary_zeros")] = layer.ternary_zeros
        if self._system is not None:
            record |= self._system.sample()
        self._write(record, step)
        self._console.step(step, record)

    def evaluation(self, step: int, loss: float, seconds: float) -> None:
        """Record a held-out loss; its time does not count as training time."""
        self._val_loss = loss
        self._last_time += seconds
        if self.world.is_main:
            if step not in self._evaluated:
                tokens = float(self._phases.tokens(self._phases.samples_after(step)))
                self._write({"val/loss": loss, "val/perplexity": perplexity(loss), "train/tokens": tokens}, step)
            self._console.evaluation(step, loss, seconds)

    def checkpoint(self, step: int, folder: Path, seconds: float) -> None:
        """Record a complete checkpoint; its time does not count as training time."""
        self._last_time += seconds
        if self.world.is_main:
            self.directory.write_status("running", step, "checkpoint written", checkpoint=str(folder))
            self._tracker.upload()
            self._console.checkpoint(step, folder, seconds)

    def bad_chunk(self, step: int, chunk: BadChunk) -> None:
        """Say that a chunk of the data is gone around from here on; metrics.jsonl counts them."""
        if self.world.is_main:
            self._num_bad_chunks += 1
            self._write({"data/bad_chunks": float(self._num_bad_chunks)}, step)
            self._console.message(f"step {step}: other windows take the place of {chunk.problem}", style="yellow")

    def completed(self, step: int, loss: float, sample: str) -> None:
        """All steps are done."""
        self._val_loss, self._sample = loss, sample
        self._state = ("completed", f"all {step} steps done")
        if self.world.is_main and sample:
            self.directory.sample(step).write_text(sample)

    def stopped(self, step: int, signal_name: str) -> None:
        """The run saved and ends early; the same command resumes it."""
        self._state = ("stopped", f"{signal_name}: saved at step {step}, the same command resumes")

    def failed(self, error: BaseException) -> None:
        """The run ends with an error."""
        self._state = ("failed", describe(error))

    def close(self) -> None:
        """Write the final status, draw the figures, finish tracking and print the last panel."""
        if not self.world.is_main:
            return
        state, reason = self._state
        assert self._metrics is not None
        self._metrics.close()
        known = self.directory.read_status()
        if state == "failed" and known is not None and known["state"] == "failed":
            reason = known["reason"]  # of the rank that failed first: ours is only that it is gone
        # First, because everything below takes seconds that a preempted job may not have.
        self.directory.write_status(state, self.step_done, reason)
        self._plot()
        undelivered = self._tracker.close(STATUS_OF_STATE[state])
        self._console.finish(
            Summary(
                state=state,
                reason=reason,
                step=self.step_done,
                first_step=self.first_step,
                tokens=self._last_tokens - self._first_tokens,
                seconds=time.perf_counter() - self._started,
                vocab_size=self.vocab_size,
                run_directory=self.directory.path,
                val_loss=self._val_loss,
                sample=self._sample,
                tracking=self._tracker.location,
                undelivered=undelivered,
            )
        )
        self._console.close()

    def _plot(self) -> None:
        if not self.directory.metrics.stat().st_size:
            return
        try:
            # Imported here: only rank 0 draws, once, and matplotlib is a tenth of a rank's start.
            from pipeline.figures import plot_run
            from pipeline.moe_figures import plot_expert_load

            plot_run(self.directory.metrics, self.directory.figures)
            plot_expert_load(self.directory.metrics, self.directory.figures)
        except Exception as error:  # a run that is trained and saved must not fail for a picture
            self._console.message(f"figures are not drawn: {describe(error)}", style="yellow")

    def _write(self, record: dict[str, float], step: int) -> None:
        assert self._metrics is not None
        self._tracker.log(record, step, time_ms=self._metrics.write(record, step))

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        """Dense-equivalent model FLOP/s over the devices' bf16 peak, where the peak is known."""
        if self.world.device.type != "cuda":
            return {}
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is None:
            return {}
        rate = flops_per_token(self.config, self.vocab_size) * tokens_per_second
        return {"perf/mfu_dense_bf16": rate / (peak * self.world.size)}

    def _screen(self, num_weights: Mapping[str, int], windows_per_epoch: int) -> StartScreen:
        config, parallel, is_cpu = self.config, self.config.parallel, self.world.device.type == "cpu"
        formats = layer_formats(config.model, config.parallel)
        kept = sum(count * (1 - formats[path].sparsity) for path, count in num_weights.items())
        share = kept / max(1, sum(num_weights.values()))
        return StartScreen(
            title=f"qsparse: {config.run.name}",
            changes=differences(config),
            grid=ParallelGrid(
                num_layers=config.model.num_layers,
                tp=parallel.tp,
                pp=parallel.pp,
                cp=parallel.cp,
                dp=self.world.dp_size,
                vpp=parallel.vpp,
                ep=parallel.ep,
                etp=(parallel.etp or parallel.tp) if config.model.moe else 1,
                sequence_parallel=parallel.sequence_parallel,
            ),
            layers=group_layers(formats),
            parameters=self._size.total,
            activated_parameters=self._size.active_projections * share + self._size.embeddings + self._size.other,
            tokens_per_step=config.training.global_batch_size * config.training.seq_length,
            total_steps=config.training.steps,
            dataset=_describe_data(config, self._phases, windows_per_epoch),
            device=describe_device("" if is_cpu else torch.cuda.get_device_name(), config),
            run_directory=self.directory.path,
            tracking=self._tracker.location,
            memory_bytes=None if is_cpu else memory_of_run(config, self.vocab_size, self.world.dp_size),
            resumed_step=self.first_step or None,
        )


def tell_complete(config: Config, world: World, directory: RunDirectory, step: int) -> None:
    """Say that there is nothing left to train; touches nothing."""
    if world.is_main:
        total = f"training.steps={config.training.steps}"
        print(
            f"run {config.run.name} is complete: {step} steps are done, {total}. It is in {directory.path}; raise "
            "training.steps to train on, or choose another run.name",
            flush=True,
        )


def _describe_data(config: Config, phases: Phases, windows_per_epoch: int) -> str:
    epochs = phases.samples_after(config.training.steps) / windows_per_epoch
    names = ", ".join(source.path for source in config.data.all_sources)
    return f"{names}: {windows_per_epoch:,} windows of {phases.at(0).seq_length} tokens, {epochs:.2f} epochs"


def _facts(world: World, vocab_size: int) -> dict[str, str]:
    """Software, and what of the machine and the data comparisons need and the configuration does not say."""
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    return {**describe_environment(), "device": device, "world_size": str(world.size), "vocab_size": str(vocab_size)}


def _peak_bytes(world: World) -> int:
    """The largest over the ranks; collective."""
    if world.device.type == "cuda":
        own = torch.cuda.max_memory_allocated()
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.tensor(own, device=world.device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return int(peak)


def describe_device(gpu: str, config: Config) -> str:
    """One line: device, precision, and whose kernels and attention compute; `gpu` is empty on a CPU."""
    device = gpu or f"CPU, {os.cpu_count()} cores, gloo"
    kernels = "Triton" if uses_triton(config) else "reference"
    attention = "Transformer Engine" if uses_transformer_engine(config) else "megatron-core"
    precision = config.training.precision
    return f"{device}; {precision}; {kernels} kernels; attention of {attention}; torch {torch.__version__}"
