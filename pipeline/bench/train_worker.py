"""One rank of `qsparse bench train`: trains one variant of one shape and writes what it measured.

    python -m pipeline.bench.train_worker ORDER_JSON RESULT_JSON      (with torchrun's environment variables)

Each variant gets processes of its own, so that the peak of its memory is its own.
"""

import json
import sys
from pathlib import Path

from pipeline.bench.train_variants import Order
from pipeline.run_entry import prepare_process


def main(order: Order, output: Path) -> None:
    """Measure, and write the result on rank 0."""
    config = order.config()
    prepare_process(config)
    from pipeline.bench.train_steps import measure  # megatron-core may be imported only now

    result = measure(order, config)
    if result is not None:
        output.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Order(**json.loads(sys.argv[1])), Path(sys.argv[2]))
