"""A layer's losses and weight gradients on Triton's kernels, shared by two processes and alone; run with torchrun.

Triton interprets its kernels, which a GPU's layers take as they are here.  Argument: a JSON file to write what differs
to, {case: {name: relative distance}}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.cpu_backend import install

if __name__ == "__main__":  # Triton and megatron-core may be imported only after this
    os.environ["TRITON_INTERPRET"] = "1"
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from kernels.triton_kernels import TritonKernels
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.model import build_model
from pipeline.world import initialize_layout
from tests.plan.real_model import use

FULL = {"sparsity": 0.5, "weights": "ternary", "activations": "int8", "sub_norm": True}
MIXTURE = {"num_experts": 3, "top_k": 2, "balancing": "none", "dispatcher": "allgather", "execution": "grouped"}
CASES: dict[str, dict[str, Any]] = {
    "relu2_glu": {"activation": "relu2_glu", "qsparse": FULL, "ffn_hidden_size": 96},
    "swiglu, computed again": {"activation": "swiglu", "qsparse": FULL, "ffn_hidden_size": 96},
    "experts in bf16": {"activation": "relu2_glu", "moe": MIXTURE, "ffn_hidden_size": 256},
}
"""What is special about the model."""


def config(case: str, tp: int) -> Config:
    shape = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    values: dict[str, Any] = {
        "run": {"device": "cpu", "backend": "local"},
        "model": {**shape, **CASES[case]},
        "parallel": {"tp": tp, "dp": 2 // tp, "sequence_parallel": tp > 1},
        "training": {"seq_length": 8, "micro_batch_size": 1, "global_batch_size": 2, "precision": "bf16"},
    }
    return Config(**values)


def run(case: str, tp: int) -> dict[str, Tensor]:
    """Losses of all tokens, and the gradients of the linear layers' weights and SubLN gains."""
    given = config(case, tp)
    initialize_layout(given)
    try:
        model = build_model(given, 128)
        use(model, TritonKernels(), recompute="again" in case)
        model.schedule.weights_changed()
        (chunk,) = model.chunks
        tokens = (torch.arange(9) * 37 % 120).expand(1, -1)
        losses = chunk(**Engine(model.chunks, given).inputs.arguments(tokens, labels=True))
        losses.float().mean().backward()
        grads = {
            name.split(".layers.0.")[1]: parameter.grad.float()
            for name, parameter in chunk.named_parameters()
            if ".linear_" in name and parameter.grad is not None
        }
        return {"losses": losses.detach().float(), **grads}
    finally:
        parallel_state.destroy_model_parallel()


def shard(whole: Tensor, like: Tensor, name: str) -> Tensor:
    """This rank's part of a parameter; gate and up are shared each for itself."""
    if whole.shape == like.shape:
        return whole
    dim = next(d for d, (a, b) in enumerate(zip(whole.shape, like.shape, strict=True)) if a != b)
    parts = whole.chunk(2 if "linear_fc1" in name else 1, dim)
    return torch.cat([part.chunk(2, dim)[dist.get_rank()] for part in parts], dim)


def main(output: Path) -> None:
    """Compare; rank 0 writes what it holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    distances = {}
    for case in CASES:
        alone, shared = run(case, 1), run(case, 2)
        pairs = {name: (shard(alone[name], found, name), found) for name, found in shared.items()}
        distances[case] = {name: ((a - b).norm() / a.norm()).item() for name, (a, b) in pairs.items()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(distances))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
