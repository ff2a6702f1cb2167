"""Train or resume a run: every rank runs this module, started by `qsparse train` or by torchrun."""

import argparse
from pathlib import Path

from pipeline.config_loader import load_config
from pipeline.run_entry import prepare_process, run_ranks


def main() -> None:
    """Parse, build, run, close."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=__doc__)
    parser.add_argument("config", type=Path, help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    arguments = parser.parse_args()
    run_ranks(lambda: _train(arguments.config, arguments.overrides))


def _train(path: Path, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    prepare_process(config)
    # megatron-core may be imported only now
    from pipeline.trainer import Trainer
    from pipeline.world import parallel_world

    with parallel_world(config) as world, Trainer(config, world) as trainer:
        trainer.run()


if __name__ == "__main__":
    main()
