"""Train or resume a run: every rank runs this module, started by `qsparse train` or by torchrun."""

import argparse
from contextlib import closing
from pathlib import Path

from pipeline.config_loader import load_config
from pipeline.run_directory import RunDirectory
from pipeline.run_entry import prepare_process, run_ranks


def main() -> None:
    """Parse, build, run, close."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=__doc__)
    parser.add_argument("config", type=Path, help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    arguments = parser.parse_args()
    run_ranks(lambda: train(arguments.config, arguments.overrides))


def train(path: Path, overrides: list[str]) -> None:
    """Train the run of a configuration on this rank, or say that it is complete."""
    config = load_config(path, overrides)
    prepare_process(config)
    # megatron-core may be imported only now
    from pipeline.ownership import owned
    from pipeline.reporter import tell_complete
    from pipeline.start import find_start, open_data
    from pipeline.trainer import Trainer
    from pipeline.world import parallel_world

    directory = RunDirectory(config.run.root / config.run.name)
    with parallel_world(config) as world, owned(directory, world), closing(open_data(config, world)) as data:
        start = find_start(config, directory, data)
        if start.is_complete:
            tell_complete(config, world, directory, start.progress.step)
            return
        with Trainer(config, world, directory, data, start) as trainer:
            trainer.run()


if __name__ == "__main__":
    main()
