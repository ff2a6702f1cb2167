"""Train small models that gather their parameters in one way or another, and write down what came out; with torchrun.

Arguments: a JSON file of {name: config dictionary}, a JSON file to write {name: results} to, a folder for checkpoints,
and the step after which to save one.
"""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.cpu_backend import install

if __name__ == "__main__":  # megatron-core may be imported only after this
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.checkpoint import Checkpoints, Progress, load, read_progress
from pipeline.config import Config
from pipeline.learner import Learner
from pipeline.world import current_world, initialize_layout
from tests.testing import TextWindows

COUNTED_STEP = 3


class GatheredBytes(TorchDispatchMode):
    """Bytes of the results of collectives that bring tensors together, by kind and type."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::")
        if name in ("_allgather_base_", "allgather_into_tensor_coalesced_", "alltoall_base_"):
            for result in args[0] if isinstance(args[0], list) else [args[0]]:
                self.found[f"{name.split('_')[0 if name[0] == 'a' else 1]} {result.dtype}"] += result.nbytes
        return func(*args, **(kwargs or {}))


def digest(tensors: list[Tensor]) -> str:
    """The same for equal bits."""
    return sha256(
        b"".join(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    ).hexdigest()


def new_learner(config: Config) -> Learner:
    data = TextWindows(config.training.seq_length)
    return Learner(config, current_world(config), data, vocab_size=256, eod_id=ord("\n"))


def results(config: Config, folder: Path, saved_step: int) -> dict[str, Any]:
    """Losses, bytes of a step, and what the weights are good for after a run that saved a checkpoint on its way."""
    learner, checkpoints = new_learner(config), Checkpoints(folder, config.checkpoint)
    losses, counted = [], GatheredBytes()
    for step in range(config.training.steps):
        if step == saved_step:
            progress = Progress(step=step, consumed_samples=learner.consumed_samples)
            checkpoints.save(learner.chunks, learner.optimizer, progress)
        with counted if step == COUNTED_STEP else nullcontext():
            losses.append(learner.step(step).loss)
    learner.close()
    return {"losses": losses, "bytes": counted.found, **sizes(learner), **outcome(learner)}


def resumed_results(config: Config, folder: Path) -> dict[str, Any]:
    """The same of a run that goes on from that checkpoint."""
    learner, saved = new_learner(config), Checkpoints(folder, config.checkpoint).require_latest()
    load(saved, learner.chunks, learner.optimizer)
    progress = read_progress(saved)
    learner.continue_from(progress.step, progress.consumed_samples)
    losses = [learner.step(step).loss for step in range(progress.step, config.training.steps)]
    learner.close()
    return {"losses": losses, **outcome(learner)}


def sizes(learner: Learner) -> dict[str, int]:
    """Elements of this rank's ternary weights, of all its parameters, and of the buffers that hold them."""
    ternary = [layer.module.weight for layer in learner.model.layers if layer.format.weights == "ternary"]
    parameters = [parameter for chunk in learner.chunks for parameter in chunk.parameters()]
    buffers = [
        buffer.param_data for chunk in learner.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers
    ]
    kinds = {"ternary": ternary, "parameters": parameters, "buffers": buffers}
    return {name: sum(tensor.numel() for tensor in tensors) for name, tensors in kinds.items()}


def outcome(learner: Learner) -> dict[str, Any]:
    """What evaluation, generation and a checkpoint see after training; `kept` are the weights as they lie here."""
    data = TextWindows(learner.config.training.seq_length)
    prompt = torch.from_numpy(data.windows([5])[:, :-1])
    parameters = [parameter for chunk in learner.chunks for parameter in chunk.parameters()]
    found = {
        "val": learner.evaluate(data),
        "logits": digest([learner.engine.logits(prompt)]),
        "kept": digest(parameters),
    }
    for chunk in learner.chunks:
        chunk.start_param_sync(force_sync=True)
    return found | {"weights": digest(parameters)}


def run(config: Config, folder: Path, saved_step: int) -> dict[str, Any]:
    """Results of one case; with `ternary_param_gather` also of resuming it."""
    initialize_layout(config)
    found = results(config, folder, saved_step)
    if config.parallel.ternary_param_gather:
        found["resumed"] = resumed_results(config, folder)
    parallel_state.destroy_model_parallel()
    return found


def main() -> None:
    """Run every case and write what rank 0 found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {name: run(Config(**values), Path(sys.argv[3], name), int(sys.argv[4])) for name, values in cases.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
