"""How the processes of a run start and end: `pipeline.train`, `generate` and `evaluate` are entered through here.

megatron-core may only be imported after `cpu_backend.install`, which needs the configuration: hence the imports inside
functions of this one module.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cpu_backend
from pipeline.config import Config
from pipeline.config_loader import load_config
from pipeline.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.data.loader import WindowDataset
    from pipeline.learner import Learner
    from pipeline.sparsity import SparsityMeter
    from pipeline.world import World

USER_ERROR = 2
"""Exit code of a mistake in configuration, data or checkpoint: restarting would not help."""


@dataclass(frozen=True)
class OpenRun:
    """A trained model, opened for looking at it."""

    config: Config
    world: "World"
    learner: "Learner"
    sparsity: "SparsityMeter"
    val_data: "WindowDataset"
    step: int
    """Optimizer steps that the weights have seen."""


def run_ranks(work: Callable[[], None]) -> None:
    """Run `work`; a user's mistake (ValueError) becomes one line and exit code 2 instead of a traceback."""
    try:
        work()
    except ValueError as error:
        if type(error).__module__.startswith(("pipeline.", "qsparse_layers.", "moe.")):
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR)
        raise


def prepare_process(config: Config) -> None:
    """Make megatron-core importable on this process's device."""
    cpu_backend.install(cpu=cpu_backend.uses_cpu(config.run.device))


@contextmanager
def open_run(path: Path) -> Iterator[OpenRun]:
    """The newest checkpoint of the run in `path`, under the run's own layout; collective.

    Raises:
        ConfigError: `path` holds no configuration.
        CheckpointError: there is no complete checkpoint.
    """
    directory = RunDirectory(path)
    config = load_config(directory.config)
    prepare_process(config)
    from pipeline.checkpoint import Checkpoints, check_fits, load, model_shape, read_progress
    from pipeline.data.loader import WindowDataset
    from pipeline.learner import Learner
    from pipeline.sparsity import SparsityMeter
    from pipeline.world import parallel_world

    with parallel_world(config) as world:
        folder = Checkpoints(directory.checkpoints, config.checkpoint).require_latest()
        progress = read_progress(folder)
        data = WindowDataset(config.data.path, "val", seq_length=config.training.seq_length, seed=config.data.seed)
        check_fits(progress, model_shape(config, data.vocab_size), folder)
        learner = Learner(config, world, data, data.vocab_size)
        load(folder, learner.chunks, None)
        learner.model.schedule.step = progress.step
        yield OpenRun(
            *(config, world, learner, SparsityMeter(learner.model.layers, learner.model.schedule, world)),
            val_data=data,
            step=progress.step,
        )
