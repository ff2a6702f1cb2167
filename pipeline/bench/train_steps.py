"""Time, memory, loss and breakdown of a few optimizer steps of a `Learner`."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.bench.kernels.timing import quartiles
from pipeline.bench.overlap import overlap
from pipeline.bench.train_categories import CATEGORIES, COMMUNICATION, OTHER, category
from pipeline.bench.train_memory import memory_by_category
from pipeline.bench.train_naive import use_fake_quantization
from pipeline.bench.train_variants import SHAPES, VARIANTS, Order
from pipeline.config import Config
from pipeline.data.loader import open_windows
from pipeline.learner import Learner
from pipeline.model import Model, build_model, transformer_config, unwrap
from pipeline.sizes import flops_per_token, peak_flops
from pipeline.world import World, parallel_world
from qsparse_layers.schedules import Schedule

FEWEST_STEPS, ENOUGH_SECONDS = 3, 4.0
"""On one GPU, steps that take long are not repeated further than this."""
KERNELS_NAMED = 25


class Kernel(NamedTuple):
    """All calls of one kernel (or operator) in a step."""

    name: str
    category: str
    calls: int
    ms: float


class RandomTokens:
    """Uniform tokens, a function of the sample number."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self._vocab_size, self._seq_length = vocab_size, seq_length

    def windows(self, samples: Sequence[int]) -> np.ndarray:
        """int64 [len(samples), seq_length + 1]."""
        rows = [np.random.default_rng(sample).integers(0, self._vocab_size, self._seq_length + 1) for sample in samples]
        return np.stack(rows).astype(np.int64)


def measure(order: Order, config: Config) -> dict[str, Any] | None:
    """Train and measure; collective.

    Returns:
        On rank 0: numbers by name; `breakdown` holds milliseconds of one step by category, `kernels` those of single
        kernels, `communication` on GPUs [milliseconds, those that nothing hides]; `memory` GiB by category.
    """
    with parallel_world(config) as world, closing(_learner(order, config, world)) as learner:
        for step in range(order.warmup_steps):
            learner.step(step)
        seconds: list[float] = []
        loss = float("nan")
        for step in range(order.warmup_steps, order.warmup_steps + order.steps):
            begin = time.perf_counter()
            loss = learner.step(step).loss
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            if order.gpus == 1 and len(seconds) >= FEWEST_STEPS and sum(seconds) > ENOUGH_SECONDS:
                break
        memory = memory_by_category(learner)
        profiler = _profile(learner, step + 1)
        if not world.is_main:
            return None
        on_gpu = world.device.type == "cuda"
        return {
            **_numbers(order, config, seconds, world),
            "peak_gib": sum(memory.values()) / 2**30,
            "loss": loss,
            "memory": {name: size / 2**30 for name, size in memory.items()},
            **_breakdown(profiler, on_gpu=on_gpu),
            "communication": _communication(profiler, on_gpu=on_gpu),
        }


def _learner(order: Order, config: Config, world: World) -> Learner:
    vocab_size, length = SHAPES[order.shape].vocab_size, config.training.seq_length
    data: Any = RandomTokens(vocab_size, length)
    if order.data is not None:
        data = open_windows(order.data, "train", seq_length=length)
    variant = VARIANTS[order.variant]
    engine = variant.engine
    if engine.startswith("te-"):
        model = te_model(config, vocab_size, fp8=engine == "te-fp8")
    else:
        model = build_model(config, vocab_size)
    if engine.startswith("fake"):
        use_fake_quantization(model, variant.sparsity, compiled=engine == "fake-compiled")
    if engine == "fake-compiled":
        for chunk in model.chunks:
            for layer in unwrap(chunk).decoder.layers:
                layer.compile(dynamic=False)
    return Learner(config, world, data, vocab_size, model=model)


def te_model(config: Config, vocab_size: int, *, fp8: bool) -> Model:
    """megatron-core's own dense GPT of the same shape on Transformer Engine's layers, in bf16 or in FP8 (hybrid)."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.module import Float16Module

    transformer = dataclasses.replace(transformer_config(config), fp8="hybrid" if fp8 else None)
    chunk = GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=config.model.padded_vocab_size(vocab_size),
        max_sequence_length=config.training.seq_length,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
    )
    schedule = Schedule(config.model.qsparse)
    return Model([Float16Module(transformer, chunk)], transformer, layers=[], schedule=schedule, routed=[])


def _profile(learner: Learner, step: int) -> profile:
    """One step: kernels on a GPU, operators on a CPU."""
    on_gpu = learner.world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        learner.step(step)
        torch.cuda.synchronize()
    return profiler


def _breakdown(profiler: profile, *, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds by category, and the longest kernels."""
    kernels = []
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False) or (on_gpu and event.device_type.name != "CUDA"):
            continue
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append(Kernel(event.key, category(event.key), event.count, time_us / 1e3))
    kernels.sort(key=lambda kernel: -kernel.ms)
    sums: dict[str, float] = {name: 0.0 for name, _ in CATEGORIES} | {OTHER: 0.0}
    for kernel in kernels:
        sums[kernel.category] += kernel.ms
    return {"breakdown": sums, "kernels": [kernel._asdict() for kernel in kernels[:KERNELS_NAMED]]}


def _communication(profiler: profile, *, on_gpu: bool) -> Sequence[float] | None:
    """Milliseconds of communication, and of it what no other kernel runs beside; None on a CPU."""
    if not on_gpu:
        return None
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            span = event.time_range.start / 1e3, event.time_range.end / 1e3
            spans[category(event.name) == COMMUNICATION].append(span)
    return overlap(spans[True], spans[False])


def _numbers(order: Order, config: Config, seconds: Sequence[float], world: World) -> dict[str, Any]:
    low, median, high = quartiles(seconds)
    tokens = config.training.global_batch_size * config.training.seq_length / order.gpus
    flops = flops_per_token(config, SHAPES[order.shape].vocab_size)
    peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
    return {
        "tokens_per_s_per_gpu": tokens / median,
        "ms_per_step": median * 1e3,
        "q25_ms": low * 1e3,
        "q75_ms": high * 1e3,
        "mfu": None if peak is None else flops * tokens / median / peak,
    }
