"""One rank of `qsparse bench trajectories`: trains one configuration and writes its losses.

    python -m pipeline.bench.trajectory_worker ORDER_JSON RESULT_JSON

Started as `pipeline.bench.train_worker` is.
"""

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.bench.train_worker import wait_for_sign
from pipeline.config import Config
from pipeline.run_entry import prepare_process


def main(order: dict[str, Any], output: Path) -> None:
    """Train; write losses, gradient norms, held-out loss and seconds on rank 0."""
    config = Config.model_validate(order["config"])
    prepare_process(config)
    from pipeline.data.loader import open_windows  # megatron-core may be imported only now
    from pipeline.learner import Learner
    from pipeline.world import parallel_world

    wait_for_sign()
    length = config.training.seq_length
    train, held_out = (open_windows(order["data"], split, seq_length=length) for split in ("train", "val"))
    with parallel_world(config) as world:
        with closing(Learner(config, world, train, train.vocab_size, eod_id=train.eod_id)) as learner:
            begin = time.perf_counter()
            results = [learner.step(step) for step in range(config.training.steps)]
            seconds = time.perf_counter() - begin
            loss = learner.evaluate(held_out)
        if world.is_main:
            found = {"loss": [one.loss for one in results], "grad_norm": [one.grad_norm for one in results]}
            output.write_text(json.dumps(found | {"held_out": loss, "seconds": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
