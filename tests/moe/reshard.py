"""Save under one expert-parallel layout, go on under the same and under others; run it with torchrun.

Arguments: a JSON file of {name: {"from": config, "to": {name: config}}}, a folder for checkpoints, and a JSON file to
write {name: {"uninterrupted", "same" or name: losses}} to.
"""

import json
import sys
from pathlib import Path

from pipeline.cpu_backend import install

if __name__ == "__main__":  # megatron-core may be imported only after this
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipeline.checkpoint import Checkpoints, Progress, load
from pipeline.config import Config
from pipeline.learner import Learner
from pipeline.world import current_world, initialize_layout
from tests.testing import TextWindows

BEFORE, AFTER = 3, 3


def _steps(config: Config, folder: Path, *, saves: bool) -> list[float]:
    """Losses of the steps after the checkpoint in `folder`, which is loaded, or written on the way."""
    initialize_layout(config)
    try:
        data = TextWindows(config.training.seq_length)
        learner = Learner(config, current_world(config), data, vocab_size=256)
        checkpoints = Checkpoints(folder, config.checkpoint)
        if saves:
            for step in range(BEFORE):
                learner.step(step)
            checkpoints.save(learner.chunks, learner.optimizer, Progress(BEFORE, learner.consumed_samples))
        else:
            load(checkpoints.require_latest(), learner.chunks, learner.optimizer)
            learner.continue_from(BEFORE, BEFORE * config.training.global_batch_size)
        return [learner.step(step).loss for step in range(BEFORE, BEFORE + AFTER)]
    finally:
        learner.close()
        parallel_state.destroy_model_parallel()


def main(cases: dict, folder: Path, output: Path) -> None:
    """Run every case and write the losses on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, values in cases.items():
        place = folder / name
        results[name] = {"uninterrupted": _steps(Config(**values["from"]), place, saves=True)}
        for other, config in {"same": values["from"], **values["to"]}.items():
            results[name][other] = _steps(Config(**config), place, saves=False)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3]))
