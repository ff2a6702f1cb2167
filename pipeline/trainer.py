"""The run around the learner: resume, train, evaluate, save, stop.  Read it from top to bottom.

Rank 0 writes run directory, metrics, MLflow and console through `Reporter`; everything else is collective.
"""

import time
from types import TracebackType
from typing import Self

from pipeline.checkpoint import Checkpoints, Progress, check_fits, load, model_shape, read_progress
from pipeline.config import Config
from pipeline.data.errors import DataError
from pipeline.data.loader import WindowDataset
from pipeline.data.tokenizer import load_tokenizer
from pipeline.generate import generate
from pipeline.learner import Learner, StepResult
from pipeline.reporter import Reporter
from pipeline.run_directory import RunDirectory
from pipeline.signals import StopRequest
from pipeline.sparsity import SparsityMeter
from pipeline.world import World

SAMPLE_PROMPT = "def "


class Trainer:
    """One start of a run, new or resumed; a context manager that ends the run's records truthfully.

    Args:
        config: the run.
        world: this process's place in the layout.

    Raises:
        DataError: the dataset is missing or damaged.
        CheckpointError: the run's checkpoints, or `checkpoint.load`, belong to another model or data order.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.train_data = self._open("train")
        self.val_data = self._open("val")
        self.vocab_size = self.train_data.vocab_size
        check_vocabulary(config, self.vocab_size)
        self.directory = RunDirectory(config.run.root / config.run.name)
        self.checkpoints = Checkpoints(self.directory.checkpoints, config.checkpoint)
        self.learner = Learner(config, world, self.train_data, self.vocab_size)
        self.progress = self._resume()
        self.sparsity = SparsityMeter(self.learner.model.layers, self.learner.model.schedule, world)
        self.reporter = Reporter(config, world, self.directory, self.vocab_size, self.progress.step)
        self.stop_request = StopRequest()

    def run(self) -> None:
        """Train from the last checkpoint to `training.steps`, or until a stop signal."""
        step = self.progress.step
        self.reporter.start(self.sparsity.num_weights, self.train_data.num_windows)
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
        logged = self.reporter.is_logged(step + 1)
        if logged:
            self.sparsity.start()
        result = self.learner.step(step, stop=self.stop_request.signal_name is not None)
        self.reporter.advance(step + 1)
        if logged:
            self.reporter.step(step + 1, result, self.sparsity.stop(), self.learner.reader)
        return result

    def _evaluate(self, step: int) -> float:
        start = time.perf_counter()
        loss = self.learner.evaluate(self.val_data)
        self.reporter.evaluation(step, loss, time.perf_counter() - start)
        return loss

    def _save(self, step: int) -> None:
        start = time.perf_counter()
        progress = Progress(
            step=step,
            consumed_samples=step * self.config.training.global_batch_size,
            data_fingerprint=self.train_data.fingerprint,
            model_shape=model_shape(self.config, self.vocab_size),
        )
        folder = self.checkpoints.save(self.learner.chunks, self.learner.optimizer, progress)
        self.reporter.checkpoint(step, folder, time.perf_counter() - start)

    def _finish(self, step: int) -> None:
        loss = self._evaluate(step)
        sample = ""
        if self.config.training.sample_tokens:
            sample = generate(
                *(self.learner.engine, load_tokenizer(self.val_data.tokenizer_path)),
                *(SAMPLE_PROMPT, self.config.training.sample_tokens),
                seq_length=self.config.training.seq_length,
                device=self.world.device,
            )
        self.reporter.completed(step, loss, sample)

    def _resume(self) -> Progress:
        """Load the run's newest checkpoint, or the weights of `checkpoint.load`, or start from scratch."""
        shape = model_shape(self.config, self.vocab_size)
        if folder := self.checkpoints.latest():
            progress = read_progress(folder)
            check_fits(progress, shape, folder, self.train_data.fingerprint)
            load(folder, self.learner.chunks, self.learner.optimizer)
            return progress
        if folder := self.config.checkpoint.load:
            check_fits(read_progress(folder), shape, folder)
            load(folder, self.learner.chunks, None)
            self.learner.optimizer.reload_model_params()
        return Progress()

    def _due(self, step: int, interval: int) -> bool:
        return interval > 0 and step % interval == 0 and step < self.config.training.steps

    def _open(self, split: str) -> WindowDataset:
        length = self.config.training.seq_length
        return WindowDataset(self.config.data.path, split, seq_length=length, seed=self.config.data.seed)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        self.stop_request.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_request.__exit__()
        if error is not None:
            self.reporter.failed(error)
        self.reporter.close()
        self.train_data.close()
        self.val_data.close()


def check_vocabulary(config: Config, vocab_size: int) -> None:
    """The dataset's token ids must have rows in the embedding table, and the table must divide over the TP ranks.

    Raises:
        DataError: names key, value and the dataset's vocabulary.
    """
    model, tp = config.model, config.parallel.tp
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise DataError(
            f"model.vocab_size={model.vocab_size} is smaller than the {vocab_size} token ids of the tokenizer in "
            f"data.path={config.data.path}; leave model.vocab_size absent or use at least {vocab_size}"
        )
    if (padded := model.padded_vocab_size(model.vocab_size or vocab_size)) % tp:
        raise DataError(
            f"the vocabulary of {padded} (padded to model.vocab_multiple={model.vocab_multiple}) does not divide over "
            f"parallel.tp={tp}; make model.vocab_multiple a multiple of {tp}"
        )
