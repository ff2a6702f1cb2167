"""The run around the learner: resume, train, evaluate, save, stop.  Read it from top to bottom.

Rank 0 writes run directory, metrics, MLflow and console through `Reporter`; everything else is collective.
"""

import os
import socket
import time
from types import TracebackType
from typing import Self

from moe.load import load_metrics
from pipeline.checkpoint import Checkpoints, Progress, load, model_shape, optimizer_format
from pipeline.config import Config
from pipeline.data.tokenizer import load_tokenizer
from pipeline.device_memory import explained
from pipeline.expert_load import ExpertLoadMeter
from pipeline.generate import generate
from pipeline.learner import Learner, StepResult
from pipeline.next_token import WholeContext
from pipeline.profiling import Profiler
from pipeline.reporter import Reporter
from pipeline.run_directory import RunDirectory
from pipeline.signals import StopRequest
from pipeline.sparsity import SparsityMeter
from pipeline.start import Datasets, StartingPoint
from pipeline.upcycle import load_dense
from pipeline.watchdog import Watchdog
from pipeline.world import World, agreement, on_main

SAMPLE_PROMPT = "def "


class Trainer:
    """One start of a run, new or resumed; a context manager that ends the run's records truthfully.

    Args:
        config: the run.
        world: this process's place in the layout.
        directory: the run's folder, which this start owns.
        data: the run's dataset.
        start: where to begin.

    Raises:
        UserError: the checkpoint cannot be read, or the run's folder not be written.
    """

    def __init__(
        self, config: Config, world: World, directory: RunDirectory, data: Datasets, start: StartingPoint
    ) -> None:
        self.config, self.world, self.data = config, world, data
        self.vocab_size = data.vocab_size
        self.checkpoints = Checkpoints(directory.checkpoints, config.checkpoint)
        with explained(config, world.rank, "while the model is built"):
            self.learner = Learner(
                *(config, world, data.train, self.vocab_size), eod_id=data.eod_id, bad_chunks=data.bad_chunks
            )
        self.first_step = start.progress.step
        self._load(start)
        model = self.learner.model
        self.sparsity = SparsityMeter(model.layers, model.schedule, world, config.model.moe)
        self.expert_load = ExpertLoadMeter(model.routed, world)
        with agreement():
            self.reporter = Reporter(config, world, directory, self.vocab_size, start.progress)
        with agreement():
            self.profiler = Profiler(
                *(config.profile, directory.profile),
                rank=world.rank,
                world_size=world.size,
                device=world.device,
            )
        self.stop_request = StopRequest()
        self.watchdog = Watchdog(
            *(directory, config.watchdog),
            rank=world.rank,
            world_size=world.size,
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            start=on_main(lambda: time.strftime("%Y%m%d-%H%M%S")),
        )

    def run(self) -> None:
        """Train from the last checkpoint to `training.steps`, or until a stop signal."""
        step = self.first_step
        self.reporter.start(self.sparsity.num_weights, self.data.num_windows)
        saved = step
        while step < self.config.training.steps:
            result = self._train_step(step)
            step += 1
            if self._due(step, self.config.training.eval_interval):
                self._evaluate(step)
            if self._due(step, self.config.checkpoint.interval) or result.stop_requested:
                self._save(step)
                saved = step
            if result.stop_requested:
                self.reporter.stopped(step, self.stop_request.signal_name or "a stop signal on another rank")
                return
        if saved < step:
            self._save(step)
        self._finish(step)

    def _train_step(self, step: int) -> StepResult:
        self.watchdog.beat("start" if step == self.first_step else "step", step + 1)
        logged = self.reporter.is_logged(step + 1)
        if logged:
            self.sparsity.start()
            self.expert_load.start()
        with explained(self.config, self.world.rank, f"in step {step + 1}"), self.profiler.step(step + 1):
            result = self.learner.step(step, stop=self.stop_request.signal_name is not None)
        self.reporter.advance(step + 1)
        self._tell_bad_chunks(step + 1)
        if logged:
            layers, load = self.sparsity.stop(), load_metrics(self.expert_load.stop())
            self.reporter.step(step + 1, result, layers, self.learner.reader, load)
        return result

    def _evaluate(self, step: int) -> float:
        self.watchdog.beat("evaluation", step)
        start = time.perf_counter()
        with explained(self.config, self.world.rank, f"in the evaluation after step {step}"):
            loss = self.learner.evaluate(self.data.val)
        self._tell_bad_chunks(step)
        self.reporter.evaluation(step, loss, time.perf_counter() - start)
        return loss

    def _save(self, step: int) -> None:
        self.watchdog.beat("checkpoint", step)
        start = time.perf_counter()
        self.learner.check_weights(step)
        progress = Progress(
            step=step,
            consumed_samples=self.learner.consumed_samples,
            data_fingerprint=self.data.fingerprint,
            data_order=self.data.description,
            bad_chunks=list(self.data.bad_chunks or ()),
            model_shape=model_shape(self.config, self.vocab_size),
            optimizer_format=optimizer_format(self.config),
        )
        folder = self.checkpoints.save(self.learner.chunks, self.learner.optimizer, progress)
        self.reporter.checkpoint(step, folder, time.perf_counter() - start)

    def _finish(self, step: int) -> None:
        loss = self._evaluate(step)
        sample = ""
        self.watchdog.beat("end", step)
        if self.config.training.sample_tokens:
            device = self.world.device
            predict = WholeContext(self.learner.engine, self.config.training.seq_length, device)  # compiles nothing new
            tokenizer = load_tokenizer(self.data.tokenizer_path)
            sample = generate(predict, tokenizer, SAMPLE_PROMPT, self.config.training.sample_tokens, device=device)
        self.reporter.completed(step, loss, sample)

    def _load(self, start: StartingPoint) -> None:
        if start.resume is not None:
            load(start.resume, self.learner.chunks, self.learner.optimizer)
            self.learner.continue_from(start.progress.step, start.progress.consumed_samples)
            if self.data.bad_chunks is not None:
                self.data.bad_chunks.merge(start.progress.bad_chunks)
        elif start.weights is not None:
            if self.config.checkpoint.upcycle:
                load_dense(start.weights, self.learner.chunks)
            else:
                load(start.weights, self.learner.chunks, None)
            self.learner.optimizer.reload_model_params()

    def _tell_bad_chunks(self, step: int) -> None:
        for chunk in self.learner.news:
            self.reporter.bad_chunk(step, chunk)
        self.learner.news.clear()

    def _due(self, step: int, interval: int) -> bool:
        return interval > 0 and step % interval == 0 and step < self.config.training.steps

    def __enter__(self) -> Self:
        self.stop_request.__enter__()
        self.watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.__exit__()
        self.profiler.close()
        self.learner.close()
        try:
            if error is not None:
                self.reporter.failed(error)
            self.reporter.close()
        finally:
            self.stop_request.__exit__()  # only now: when one rank ends early, torchrun sends SIGTERM to the others
