"""How the processes of a run start and end: `pipeline.train`, `generate` and `evaluate` are entered through here.

megatron-core may only be imported after `cpu_backend.install`, which needs the configuration: hence the imports inside
functions of this one module.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import cpu_backend
from pipeline.config import Config
from pipeline.config_loader import ConfigError, load_config
from pipeline.errors import AgreedError, NonFiniteError, UserError
from pipeline.exit_codes import ExitCode
from pipeline.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipeline.learner import Learner
    from pipeline.sparsity import SparsityMeter
    from pipeline.start import Datasets
    from pipeline.world import World


@dataclass(frozen=True)
class OpenRun:
    """A trained model, opened for looking at it."""

    config: Config
    world: "World"
    learner: "Learner"
    sparsity: "SparsityMeter"
    data: "Datasets"
    step: int
    """Optimizer steps that the weights have seen."""


def run_ranks(work: Callable[[], None]) -> None:
    """Run `work`; an error that speaks for itself becomes one line and an exit code instead of a traceback per rank.

    QSPARSE_TRACEBACK=1 in the environment shows the tracebacks.  The codes are those of `pipeline.exit_codes`.
    """
    try:
        work()
    except Exception as error:
        code = _exit_code(error)
        if os.environ.get("QSPARSE_TRACEBACK") or not _speaks_for_itself(error):
            traceback.print_exc()
            sys.exit(code)
        # Every rank has an agreed error, and every rank of a node reads the same configuration: told once per node.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, AgreedError | ConfigError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(code)


def _exit_code(error: Exception) -> ExitCode:
    """The code that tells whoever started the ranks whether starting them again could help."""
    from torch import OutOfMemoryError

    if isinstance(error, MemoryError | OutOfMemoryError):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, NonFiniteError):
        return ExitCode.NOT_FINITE
    return ExitCode.USER_ERROR if isinstance(error, ValueError) and _speaks_for_itself(error) else ExitCode.ERROR


def _speaks_for_itself(error: Exception) -> bool:
    return type(error).__module__.startswith(("pipeline.", "qsparse_layers.", "moe."))


def prepare_process(config: Config) -> None:
    """Check that the processes fit the layout, and make megatron-core importable on this process's device.

    Raises:
        UserError: their number does not fit, or nobody started them.
    """
    if "WORLD_SIZE" not in os.environ:
        raise UserError("this is one rank of a run: start it through `qsparse train`, or through torchrun")
    try:
        config.check_world_size(int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        raise UserError(str(error)) from None
    _quiet_libraries()
    cpu_backend.install(cpu=cpu_backend.uses_cpu(config.run.device))


def _quiet_libraries() -> None:
    """Silence what the libraries say about themselves at every start: with us none of it asks for an action."""
    for library in ("megatron", "torch.distributed"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
    # megatron-core's distributed optimizer looks at gradients of views.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")


@contextmanager
def open_run(path: Path, overrides: Sequence[str] = ()) -> Iterator[OpenRun]:
    """The newest checkpoint of the run in `path`, under the run's own layout; collective.

    Args:
        path: the run's directory.
        overrides: KEY=VALUE of its configuration, such as the path of a dataset that has moved.

    Raises:
        ConfigError: `path` holds no configuration, or an override is wrong.
        UserError: there is no complete checkpoint, or the dataset is missing or damaged.
    """
    directory = RunDirectory(path)
    config = load_config(directory.config, overrides)
    prepare_process(config)
    from pipeline.checkpoint import Checkpoints, check_files, check_fits, load, model_shape, read_progress
    from pipeline.learner import Learner
    from pipeline.sparsity import SparsityMeter
    from pipeline.start import open_data
    from pipeline.world import agreement, on_main, parallel_world

    with parallel_world(config) as world, closing(open_data(config, world)) as data:
        folder = on_main(Checkpoints(directory.checkpoints, config.checkpoint).require_latest)
        with agreement():
            progress = read_progress(folder)
            check_fits(progress, model_shape(config, data.vocab_size), folder)
            check_files(progress, folder)
        learner = Learner(config, world, data.train, data.vocab_size, eod_id=data.eod_id, bad_chunks=data.bad_chunks)
        load(folder, learner.chunks, None)
        learner.continue_from(progress.step, progress.consumed_samples)
        yield OpenRun(
            *(
                config,
                world,
                learner,
                SparsityMeter(learner.model.layers, learner.model.schedule, world, config.model.moe),
            ),
            data=data,
            step=progress.step,
        )
