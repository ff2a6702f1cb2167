"""What a start of a run begins with: its data, and the checkpoint it continues or takes its weights from.

Everything here is cheap and checked on all ranks before a model is built.  Rank 0 chooses the checkpoint: on a network
file system the ranks of other nodes may still see an older list of folders.
"""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pipeline.batches import reads_tokens
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
from pipeline.data.bad_chunks import BadChunks
from pipeline.data.errors import DataError
from pipeline.data.loader import OrderOptions, SourceFiles, WindowDataset, check_same_tokenizer
from pipeline.data.manifest import Split
from pipeline.data.phases import Phase, resolve_phases
from pipeline.data.remote import RemoteOptions, is_remote
from pipeline.errors import UserError
from pipeline.run_directory import RunDirectory
from pipeline.upcycle import dense_shape
from pipeline.world import World, agreement, on_main


@dataclass(frozen=True)
class Datasets:
    """The two splits of a run's data, open on the ranks that read."""

    sources: tuple[SourceFiles, ...]
    train: WindowDataset | None
    val: WindowDataset | None
    bad_chunks: BadChunks | None
    """Chunks that are gone around; None: a bad chunk ends the run."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer."""
        return self.sources[0].manifest.vocab_size

    @property
    def eod_id(self) -> int:
        """Token that ends every document."""
        return self.sources[0].manifest.eod_id

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer of all sources."""
        return self.sources[0].folder / self.sources[0].manifest.tokenizer.file

    @property
    def num_windows(self) -> int:
        """Training windows per epoch; 0 on ranks that do not read."""
        return self.train.num_windows if self.train else 0

    @property
    def fingerprint(self) -> str:
        """Identity of the sample order; empty on ranks that do not read."""
        return self.train.fingerprint if self.train else ""

    @property
    def description(self) -> dict[str, Any]:
        """What the fingerprint is a hash of."""
        return self.train.description if self.train else {}

    def close(self) -> None:
        """Close the shards."""
        for dataset in (self.train, self.val):
            if dataset is not None:
                dataset.close()


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


def open_data(config: Config, world: World) -> Datasets:
    """The run's data; collective.  Only ranks that read open the shards.

    Raises:
        UserError: it is missing or damaged, or does not fit the model.
    """
    data = config.data
    bad_chunks = BadChunks() if data.bad_shard == "skip" else None
    check_files = bad_chunks is None  # what is missing shows when it is read
    sources = _open_sources(config, world, check_files=check_files)
    train = val = None
    with agreement():
        check_same_tokenizer(sources)
        check_vocabulary(config, sources[0].manifest.vocab_size)
        if reads_tokens(config, world):
            phases = resolve_phases(config)
            order = OrderOptions(data.seed, data.shuffle, data.interleave)
            open_split = partial(WindowDataset, sources, order=order, bad_chunks=bad_chunks, check_files=check_files)
            train, val = open_split("train", phases=phases.all), open_split("val", phases=[_held_out(config)])
    return Datasets(sources, train, val, bad_chunks)


def _open_sources(config: Config, world: World, *, check_files: bool) -> tuple[SourceFiles, ...]:
    """One process per node copies what describes remote data, one per run combines indexes; then all open them."""
    data = config.data
    remote = RemoteOptions(
        *(Path(data.cache).expanduser(), round(data.cache_gigabytes * 1e9)),
        *(data.retries, data.timeout_seconds),
    )
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    opened: list[SourceFiles] = []
    for source in data.all_sources:
        prepares = is_first_of_node if is_remote(source.path) else world.is_main
        with agreement():
            if prepares:
                files = SourceFiles(source.path, remote)
                for split in get_args(Split):
                    if files.manifest.splits.get(split):
                        files.combine_index(split, check_files=check_files)
        with agreement():
            opened.append(files if prepares else SourceFiles(source.path, remote))
    return tuple(opened)


def _held_out(config: Config) -> Phase:
    """Evaluations measure the sources by their own weights, at the run's own length."""
    training = config.training
    weights = tuple(source.weight for source in config.data.all_sources)
    return Phase(0, 0, weights, training.seq_length, training.global_batch_size)


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
    shape = model_shape(config, data.vocab_size)
    status = directory.read_status() or {"state": "new"}
    if folder := Checkpoints(directory.checkpoints, config.checkpoint).latest():
        progress = read_progress(folder)
        check_fits(progress, shape, folder)
        check_resumable(progress, config, data.fingerprint, folder, data.description)
        resolve_phases(config).check_steps_from(progress.consumed_samples)
        check_files(progress, folder)
        is_complete = progress.step >= config.training.steps and status["state"] == "completed"
        if progress.step > config.training.steps and not is_complete:
            raise UserError(
                f"run {directory.path} has done {progress.step} steps already, training.steps={config.training.steps}; "
                f"raise training.steps to {progress.step} or more, or choose another run.name"
            )
        return StartingPoint(progress, resume=folder, is_complete=is_complete)
    if status["state"] == "completed":
        raise UserError(
            f"run {directory.path} is complete but its checkpoints are gone: starting it again would overwrite its "
            "metrics; choose another run.name or move the folder away"
        )
    if folder := config.checkpoint.load:
        progress = read_progress(folder)
        check_fits(progress, dense_shape(shape) if config.checkpoint.upcycle else shape, folder)
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
            f"{_data_key(config)}; leave model.vocab_size absent or use at least {vocab_size}"
        )
    if (padded := model.padded_vocab_size(model.vocab_size or vocab_size)) % tp:
        raise DataError(
            f"the vocabulary of {padded} (padded to model.vocab_multiple={model.vocab_multiple}) does not divide over "
            f"parallel.tp={tp}; make model.vocab_multiple a multiple of {tp}"
        )


def _data_key(config: Config) -> str:
    first = config.data.all_sources[0].path
    return f"data.sources.0.path={first}" if config.data.sources else f"data.path={first}"
