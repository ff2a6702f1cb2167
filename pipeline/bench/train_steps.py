"""Time, memory, loss and breakdown of a few optimizer steps of a `Learner`."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.bench.train_categories import CATEGORIES, OTHER, category
from pipeline.bench.train_variants import SHAPES, VARIANTS, Order
from pipeline.config import Config
from pipeline.data.loader import open_windows
from pipeline.learner import Learner
from pipeline.model import Model, build_model, transformer_config, unwrap
from pipeline.sizes import flops_per_token, peak_flops
from pipeline.world import World, parallel_world
from qsparse_layers.schedules import Schedule


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
        On rank 0: numbers by name; `breakdown` holds milliseconds of one step by category.
    """
    with parallel_world(config) as world:
        learner = _learner(order, config, world)
        for step in range(order.warmup_steps):
            learner.step(step)
        seconds, loss = [], float("nan")
        for step in range(order.warmup_steps, order.warmup_steps + order.steps):
            begin = time.perf_counter()
            loss = learner.step(step).loss
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        memory = _peak_bytes(world)
        breakdown = _breakdown(learner, order.warmup_steps + order.steps, world)
        learner.close()
        return _numbers(order, config, seconds, loss, memory, breakdown, world) if world.is_main else None


def _learner(order: Order, config: Config, world: World) -> Learner:
    vocab_size, length = SHAPES[order.shape].vocab_size, config.training.seq_length
    data: Any = RandomTokens(vocab_size, length)
    if order.data is not None:
        data = open_windows(order.data, "train", seq_length=length)
    engine = VARIANTS[order.variant].engine
    model = te_fp8_model(config, vocab_size) if engine == "te-fp8" else build_model(config, vocab_size)
    if engine == "compiled":
        for chunk in model.chunks:
            for layer in unwrap(chunk).decoder.layers:
                layer.compile(dynamic=False)
    return Learner(config, world, data, vocab_size, model=model)


def te_fp8_model(config: Config, vocab_size: int) -> Model:
    """megatron-core's own dense GPT of the same shape on Transformer Engine's FP8 linear layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.module import Float16Module

    transformer = dataclasses.replace(transformer_config(config), fp8="hybrid")
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


def _peak_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _breakdown(learner: Learner, step: int, world: World) -> dict[str, float]:
    """Milliseconds of one step by category: of kernels on a GPU, of operators on a CPU."""
    on_gpu = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        learner.step(step)
        torch.cuda.synchronize()
    totals: dict[str, float] = {name: 0.0 for name, _ in CATEGORIES} | {OTHER: 0.0}
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False):
            continue
        if on_gpu and event.device_type.name == "CUDA":
            totals[category(event.key)] += event.self_device_time_total / 1e3
        elif not on_gpu:
            totals[category(event.key)] += event.self_cpu_time_total / 1e3
    return totals


def _numbers(
    order: Order,
    config: Config,
    seconds: Sequence[float],
    loss: float,
    memory: int,
    breakdown: Mapping[str, float],
    world: World,
) -> dict[str, Any]:
    low, median, high = statistics.quantiles(list(seconds) * (3 if len(seconds) == 1 else 1), n=4, method="inclusive")
    tokens = config.training.global_batch_size * config.training.seq_length / order.gpus
    flops = flops_per_token(config, SHAPES[order.shape].vocab_size)
    peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
    return {
        "tokens_per_s_per_gpu": tokens / median,
        "ms_per_step": median * 1e3,
        "q25_ms": low * 1e3,
        "q75_ms": high * 1e3,
        "peak_gib": memory / 2**30,
        "mfu": None if peak is None else flops * tokens / median / peak,
        "loss": loss,
        "breakdown": breakdown,
    }
