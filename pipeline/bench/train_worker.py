"""One rank of `qsparse bench train`: trains one variant of one shape and writes what it measured.

    python -m pipeline.bench.train_worker ORDER_JSON RESULT_JSON

Rank and world size are in the environment as torchrun puts them there.  A line on standard input, the number of a free
port, is the sign to begin: until then the process only imports.  Each variant gets processes of its own, so that the
peak of its memory is its own.
"""

import json
import os
import sys
from pathlib import Path

from pipeline.bench.train_variants import Order
from pipeline.run_entry import prepare_process


def main(order: Order, output: Path) -> None:
    """Measure, and write the result on rank 0."""
    config = order.config()
    prepare_process(config)
    from pipeline.bench.train_steps import measure  # megatron-core may be imported only now

    wait_for_sign()
    result = measure(order, config)
    if result is not None:
        output.write_text(json.dumps(result), encoding="utf-8")


def wait_for_sign() -> None:
    """Until whoever started this process says that it is its turn; ends the process if there is nobody any more."""
    port = sys.stdin.readline().strip()
    if not port:
        sys.exit(0)
    os.environ["MASTER_PORT"] = port


if __name__ == "__main__":
    main(Order(**json.loads(sys.argv[1])), Path(sys.argv[2]))
