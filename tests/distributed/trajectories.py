"""Train the same small model under many layouts and write down the losses; run it with torchrun.

One launch runs all layouts that fit its number of processes, since importing torch and megatron-core takes longer than
training.  Arguments: a JSON file of {name: config dictionary}, a JSON file to write {name: trajectory} to, and the text
file to train on (absent: the standard library's source).
"""

import json
import os
import sys
from pathlib import Path

from pipeline.cpu_backend import install, uses_cpu

if __name__ == "__main__":  # megatron-core may be imported only after this
    CASES = json.loads(Path(sys.argv[1]).read_text())
    CPU = uses_cpu(next(iter(CASES.values()))["run"]["device"])
    install(cpu=CPU)

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipeline.config import Config
from pipeline.data.phases import resolve_phases
from pipeline.learner import Learner
from pipeline.world import current_world, initialize_layout
from tests.testing import TextWindows


class PhasedText:
    """Text whose windows are as long as the phase of the samples asks."""

    def __init__(self, config: Config, text: Path | None) -> None:
        self._phases = resolve_phases(config)
        self._texts = {phase.seq_length: TextWindows(phase.seq_length, text) for phase in self._phases.all}

    def windows(self, samples: list[int]) -> np.ndarray:
        """int64 [len(samples), seq_length + 1]."""
        return self._texts[self._phases.at(samples[0]).seq_length].windows(samples)


def trajectory(config: Config, text: Path | None) -> dict[str, list[float]]:
    """Losses and gradient norms of all steps, and the held-out loss and some logits at the end."""
    initialize_layout(config)
    try:
        data = TextWindows(config.training.seq_length, text)
        train = PhasedText(config, text) if config.data.phases else data
        learner = Learner(config, current_world(config), train, vocab_size=256, eod_id=ord("\n"))
        results = [learner.step(step) for step in range(config.training.steps)]
        learner.close()
        return {
            "loss": [result.loss for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "val": [learner.evaluate(data)],
            "logits": logits_after(learner, data),
        }
    finally:
        parallel_state.destroy_model_parallel()


def logits_after(learner: Learner, data: TextWindows) -> list[float]:
    """Some logits of what may follow a window of text; none under context parallelism, which does not generate."""
    if learner.config.parallel.cp > 1:
        return []
    prompt = torch.from_numpy(data.windows([5])[:, :-1]).to(learner.world.device)
    return learner.engine.logits(prompt)[0, -1, ord("a") : ord("z")].tolist()


def main(cases: dict[str, dict], output: Path, text: Path | None, *, cpu: bool) -> None:
    """Run every case and write the trajectories on rank 0."""
    torch.set_num_threads(1)
    if not cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if cpu else "nccl")
    results = {name: trajectory(Config(**values), text) for name, values in cases.items()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(CASES, Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None, cpu=CPU)
