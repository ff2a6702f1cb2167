"""What a start of a run begins with: its data, and the checkpoint it continues or takes its weights from.

Everything here is cheap and checked on all ranks before a model is built.  Rank 0 chooses the checkpoint: on a network
file system the ranks of other nodes may still see an older list of folders.
"""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint import (
    Checkpoints,
    Progress,
    check_files,
    check_fits,
    check_resumable,
    model_shape,
    read_progress,
)
from pipeline.config import Config
from pipeline.data.errors import DataError
from pipeline.data.loader import WindowDataset
from pipeline.errors import UserError
from pipeline.run_directory import RunDirectory
from pipeline.world import agreement, on_main


@dataclass(frozen=True)
class Datasets:
    """The two splits of a run's dataset, open."""

    train: WindowDataset
    val: WindowDataset

    def close(self) -> None:
        """Close the shards."""
        self.train.close()
        self.val.close()


@dataclass(frozen=True)
class StartingPoint:
    """Where a start of a run begins."""

    progress: Progress = field(default_factory=Progress)
    """How far the run is."""
    resume: Path | None = None
    """Checkpoint of this run to continue, with its optimizer."""
    weights: Path | None = None
    """Checkpoint of another run to take the weights from; only where there is nothing to resume."""
    is_complete: bool = False
    """All steps, the last evaluation included, are done."""


def open_data(config: Config) -> Datasets:
    """The run's dataset; collective.

    Raises:
        UserError: it is missing or damaged, or does not fit the model.
    """
    with agreement():
        data, length = config.data, config.training.seq_length
        train = WindowDataset(data.path, "train", seq_length=length, seed=data.seed)
        val = WindowDataset(data.path, "val", seq_length=length, seed=data.seed)
        check_vocabulary(config, train.vocab_size)
    return Datasets(train, val)


def find_start(config: Config, directory: RunDirectory, data: Datasets) -> StartingPoint:
    """The run's newest checkpoint, else the weights of `checkpoint.load`, else nothing; collective.

    Raises:
        UserError: the checkpoint belongs to another model or data order, or some rank cannot see it.
    """
    start = on_main(lambda: _find_start(config, directory, data))
    with agreement():
        if folder := start.resume or start.weights:
            read_progress(folder)
    return start


def _find_start(config: Config, directory: RunDirectory, data: Datasets) -> StartingPoint:
    shape = model_shape(config, data.train.vocab_size)
    status = directory.read_status() or {"state": "new"}
    if folder := Checkpoints(directory.checkpoints, config.checkpoint).latest():
        progress = read_progress(folder)
        check_fits(progress, shape, folder)
        check_resumable(progress, config, data.train.fingerprint, folder)
        check_files(progress, folder)
        is_complete = progress.step >= config.training.steps and status["state"] == "completed"
        return StartingPoint(progress, resume=folder, is_complete=is_complete)
    if status["state"] == "completed":
        raise UserError(
            f"run {directory.path} is complete but its checkpoints are gone: starting it again would overwrite its "
            "metrics; choose another run.name or move the folder away"
        )
    if folder := config.checkpoint.load:
        progress = read_progress(folder)
        check_fits(progress, shape, folder)
        check_files(progress, folder)
        return StartingPoint(weights=folder)
    return StartingPoint()


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
