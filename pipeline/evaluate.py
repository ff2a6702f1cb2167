"""Held-out loss and measured sparsity of a trained model: `qsparse evaluate RUN_DIR`."""

import argparse
import json
import math
from pathlib import Path

from pipeline.console import perplexity
from pipeline.run_entry import open_run, run_ranks


def main() -> None:
    """Load the newest checkpoint of a run, measure it, print one JSON object."""
    parser = argparse.ArgumentParser(prog="qsparse evaluate", description="Held-out loss of a run's newest checkpoint.")
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the run's configuration")
    run_ranks(lambda: _evaluate(parser.parse_args()))


def _evaluate(options: argparse.Namespace) -> None:
    with open_run(options.run_dir, options.overrides) as run:
        run.sparsity.start()
        loss = run.learner.evaluate(run.data.val)
        layers = run.sparsity.stop()
        if run.world.is_main:
            from qsparse_layers.stats import model_sparsity

            sparsity, ternary_zeros = model_sparsity(layers)
            result = {
                "step": run.step,
                "val/loss": loss,
                "val/perplexity": perplexity(loss),
                "val/bits_per_token": loss / math.log(2),
                "qsparse/sparsity": sparsity,
                "qsparse/ternary_zeros": ternary_zeros,
            }
            print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
