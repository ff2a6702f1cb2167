"""Optimizer and schedules: megatron-core's Adam with the learning-rate and weight-decay schedules of BitNet.

The schedules are pure functions of the optimizer step, so a resumed run needs no scheduler state.

BitNet's two stages (The Era of 1-bit LLMs: Training Tips, Code and FAQ, 2024): the rate decays linearly inside each
stage; at the midpoint the peak drops to a lower one and weight decay goes from 0.1 to 0.  The document shows the curve
without an equation.  Here both stages lie on lines that reach zero at the end of training,

    lr(t) = peak(t) (T - t) / (T - warmup),     peak(t) = lr before the midpoint, stage2_lr after it

so the drop at the midpoint is by the ratio of the peaks.
"""

import math
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from pipeline.config import Config
from pipeline.config import OptimizerConfig as Settings
from pipeline.model import DTYPES, Model


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    left = (total - step) / (total - warmup)  # 1 at the end of the warm-up, 0 at the end of training
    span = settings.lr - settings.min_lr
    match settings.schedule:
        case "two_stage":
            return left * (settings.stage2_lr if _in_stage2(step, total, settings) else settings.lr)
        case "cosine":
            return settings.min_lr + span * (1 + math.cos(math.pi * (1 - left))) / 2
        case "linear":
            return settings.min_lr + span * left
        case "wsd":
            return settings.min_lr + span * min(1.0, (total - step) / (settings.wsd_decay_share * total))
        case "constant":
            return settings.lr


def weight_decay(step: int, total: int, settings: Settings) -> float:
    """Weight decay of optimizer step `step`: 0 in the second of BitNet's stages, else the configured one."""
    if settings.schedule == "two_stage" and _in_stage2(step, total, settings):
        return 0.0
    return settings.weight_decay


def _in_stage2(step: int, total: int, settings: Settings) -> bool:
    return step >= settings.stage2_start * total


def wrap_data_parallel(model: Model, config: Config) -> list[DistributedDataParallel]:
    """The model's chunks inside megatron-core's data parallelism; gradients are reduced in fp32 (fp64 for fp64)."""
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.precision != "fp64",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [
        DistributedDataParallel(
            model.config, ddp, chunk, disable_bucketing=index > 0 and not parallel.overlap_grad_reduce
        )
        for index, chunk in enumerate(model.chunks)
    ]


def build_optimizer(model: Model, chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """megatron-core's optimizer over the wrapped chunks, and the hooks through which its schedules call it."""
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=_clip_norm(config),
            bf16=config.training.precision == "bf16",
            params_dtype=DTYPES[config.training.precision],
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        chunks,
    )
    _connect_schedules(model.config, chunks, optimizer, config)
    return optimizer


def _clip_norm(config: Config) -> float:
    """megatron-core measures the gradient norm only while it clips: without a clip, clip at a norm never reached."""
    if config.training.precision == "fp64":  # its clipping knows float32 gradients only
        return 0.0
    return config.optimizer.clip_grad or 1e30


def _connect_schedules(
    transformer: Any, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: Config
) -> None:
    def each(name: str) -> Any:
        methods = [getattr(chunk, name) for chunk in chunks]
        return methods if len(methods) > 1 else methods[0]

    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        transformer.no_sync_func = each("no_sync")
        if config.parallel.pp > 1:
            transformer.grad_sync_func = each("start_grad_sync")
    if config.parallel.overlap_param_gather and config.parallel.vpp > 1:
        transformer.param_sync_func = each("start_param_sync")


def set_step(optimizer: MegatronOptimizer, step: int, config: Config) -> tuple[float, float]:
    """Give all parameter groups the learning rate and weight decay of `step`; returns both."""
    lr = learning_rate(step, config.training.steps, config.optimizer)
    decay = weight_decay(step, config.training.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = decay * group.get("wd_mult", 1.0)
    return lr, decay
