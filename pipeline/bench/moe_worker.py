"""One rank of `qsparse bench moe`: checks variants of an MoE layer, or times them in turns.

    python -m pipeline.bench.moe_worker JOB_JSON RESULT_JSON      (with torchrun's environment variables)

Checked on a few tokens: grouped experts against the same experts one after the other (output of ternary ones bit for
bit), and against the reference kernels, forward and gradients.  Timed: each round runs forward and backward of every
variant, from a CUDA graph where nothing waits for token counts on the host; with several processes they are called, as
often on every rank.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.bench.kernels.timing import measure, side_stream
from pipeline.cpu_backend import install

CHECKED_TOKENS = 512
FILL_US = 20_000.0
"""Time that one timing takes at least, on one GPU."""
BOUNDS = {"ours exact": 0.02, "ours e4m3": 0.1, "ours dense": 0.01}
"""Relative errors of outputs and gradients: SubLN summed in another order moves single codes; e4m3 keeps 4 bits."""


class Shape(NamedTuple):
    """A layer and its tokens."""

    num_experts: int
    top_k: int
    tokens: int
    """Per process."""
    hidden_size: int
    ffn_hidden_size: int
    """Of one expert."""


SHAPES = {
    "top-2 of 8, 4096 -> 14336": Shape(8, 2, 16384, 4096, 14336),
    "top-8 of 64, 2048 -> 1408": Shape(64, 8, 16384, 2048, 1408),
    "tiny": Shape(4, 2, 64, 128, 64),
}


class Job(NamedTuple):
    """What the ranks do."""

    layer: str
    """Key of `SHAPES`."""
    variants: Sequence[str]
    device: str
    rounds: int
    """Times that each variant is timed; 0: they are checked instead."""


def main(job: Job, output: Path) -> None:
    """Rank 0 writes the rows, what is wrong, and why variants are absent."""
    install(cpu=job.device == "cpu")
    from pipeline.bench import moe_variants  # megatron-core may be imported only now
    from pipeline.world import parallel_world

    shape, size = SHAPES[job.layer], int(os.environ["WORLD_SIZE"])
    config = moe_variants.configuration(shape, job.variants[0], job.device, size)
    with parallel_world(config) as world, torch.cuda.stream(stream := side_stream()):  # on this rank's GPU
        # A graph is recorded on the stream that autograd has seen.
        layers, absent = _layers(moe_variants.build, shape, job, size)
        wrong, rows = [], []
        if job.rounds:
            rows = _rows(layers, shape, job, size, stream)
        else:
            wrong = [message for name, layer in layers.items() for message in _wrong(name, layer, shape, job.device)]
        if world.is_main:
            output.write_text(json.dumps({"wrong": wrong, "rows": rows, "absent": absent}), encoding="utf-8")


def _say(text: str) -> None:
    if os.environ["RANK"] == "0":
        print(f"{time.strftime('%X')} {text}", flush=True)


def _layers(build: Callable[..., Any], shape: Shape, job: Job, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers that share weights, and why others are absent: each runs once on a few tokens."""
    layers: dict[str, Any] = {}
    absent = {}
    for name in job.variants:
        try:
            layer = build(shape, name, job.device, size, next(iter(layers.values()), None))
            _step(layer, *_operands(shape, CHECKED_TOKENS, job.device))()
        except (ImportError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            if name in BOUNDS:
                raise
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            layers[name] = layer
            _say(f"{job.layer}: {name} runs")
    return layers, absent


def _operands(shape: Shape, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(2, tokens, 1, shape.hidden_size, generator=generator, device=device).bfloat16()
    return values[0].requires_grad_(), values[1]


def _step(layer: Any, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run() -> tuple[Tensor, ...]:
        y, _ = layer(x)
        return y, *torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True)

    return run


def _wrong(name: str, layer: Any, shape: Shape, device: str) -> Iterator[str]:
    """What is wrong with our experts."""
    from moe.experts import QSparseSequentialMLP

    counts = 16 * torch.randint(
        0, max(1, CHECKED_TOKENS // shape.num_experts // 8), (len(layer.experts.local_experts),)
    )
    counts[0], counts[-1] = 0, 16  # an expert without tokens
    x, grad = (t[:, 0].detach() for t in _operands(shape, int(counts.sum()), device))
    grouped = _outcome(layer.experts, type(layer.experts).outputs, counts, x, grad)
    if layer.experts.local_experts[0].linear_fc1.format.weights == "ternary":
        sequential = _outcome(layer.experts, QSparseSequentialMLP.outputs, counts, x, grad)
        if not torch.equal(grouped[0], sequential[0]):
            yield f"{name}: grouped and sequential outputs differ"
    with _reference_kernels(layer.experts):
        reference = _outcome(layer.experts, QSparseSequentialMLP.outputs, counts, x, grad)
    for what, got, want in zip(("y", "dX", "dW up", "dW down"), grouped, reference, strict=True):
        error, bound = float((got.double() - want.double()).norm() / want.double().norm()), BOUNDS[name]
        _say(f"{name}, {what}: relative error {error:.1e}, bound {bound:g}")
        if not error <= bound:
            yield f"{name}, {what}: relative error {error:.2e} against the reference, bound {bound:g}"


def _outcome(experts: Any, outputs: Callable[..., Tensor], counts: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Outputs, dX, and dW of the last expert."""
    from moe.dispatcher import ExpertInput

    leaf, last = x.clone().requires_grad_(), experts.local_experts[-1]
    weights = [last.linear_fc1.weight, last.linear_fc2.weight]
    for parameter in experts.parameters():
        parameter.grad_added_to_main_grad = False
        if getattr(parameter, "main_grad", None) is not None:
            parameter.main_grad.zero_()
    y = outputs(experts, ExpertInput(leaf), counts)
    dx, *dws = torch.autograd.grad(y, [leaf, *weights], grad)
    pairs = zip(weights, dws, strict=True)
    return [y.detach(), dx, *(w.main_grad.clone() if w.grad_added_to_main_grad else dw for w, dw in pairs)]


class _reference_kernels:  # noqa: N801 - a context manager
    """Linear layers of `experts` compute with the reference inside."""

    def __init__(self, experts: Any) -> None:
        self._linears = [linear for one in experts.local_experts for linear in (one.linear_fc1, one.linear_fc2)]
        self._kernels = self._linears[0].kernels

    def __enter__(self) -> None:
        from kernels.dispatch import ReferenceKernels

        for linear in self._linears:
            linear.kernels = ReferenceKernels()

    def __exit__(self, *error: object) -> None:
        for linear in self._linears:
            linear.kernels = self._kernels


def _rows(
    layers: Mapping[str, Any], shape: Shape, job: Job, size: int, stream: torch.cuda.Stream | None
) -> list[dict[str, str]]:
    """Times and memory of each layer, in turns, on `stream`."""
    x, grad = _operands(shape, shape.tokens, job.device)
    calls = {name: _step(layer, x, grad) for name, layer in layers.items()}
    peaks = {name: _peak_bytes(call, job.device) for name, call in calls.items()}
    fill_us = FILL_US if size == 1 else 1.0  # one call: ranks would come to different numbers
    timings = measure(calls, rounds=job.rounds, fill_us=fill_us, stream=stream, graphs=size == 1)
    rows = []
    for name, timing in timings.items():
        low, median, high = (f"{us / 1e3:.3f}" for us in (timing.low, timing.median, timing.high))
        row = {"variant": name, "ms": median, "q25_ms": low, "q75_ms": high, "timed": timing.how}
        row |= {"tokens_per_s_per_gpu": f"{shape.tokens / timing.median * 1e6:.0f}"}
        row |= {"step_gib": f"{peaks[name] / 2**30:.2f}"}
        rows.append(row)
        _say(f"{job.layer}: {median} ms ({timing.how}), {row['step_gib']} GiB: {name}")
    return rows


def _peak_bytes(call: Callable[[], object], device: str) -> int:
    """Memory that one forward and backward take on top of weights and gradient buffers."""
    call()
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
