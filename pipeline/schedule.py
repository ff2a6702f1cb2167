"""Learning rate and weight decay as pure functions of the optimizer step: a resumed run needs no scheduler state.

BitNet's two stages (The Era of 1-bit LLMs: Training Tips, Code and FAQ, 2024): the rate decays linearly inside each
stage; at the midpoint the peak drops to a lower one and weight decay goes from 0.1 to 0.  The document shows the curve
without an equation.  Here both stages lie on lines that reach zero at the end of training,

    lr(t) = peak(t) (T - t) / (T - warmup),     peak(t) = lr before the midpoint, stage2_lr after it

so the drop at the midpoint is by the ratio of the peaks.
"""

import math

from pipeline.config import OptimizerConfig


def learning_rate(step: int, total: int, settings: OptimizerConfig) -> float:
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


def weight_decay(step: int, total: int, settings: OptimizerConfig) -> float:
    """Weight decay of optimizer step `step`: 0 in the second of BitNet's stages, else the configured one."""
    if settings.schedule == "two_stage" and _in_stage2(step, total, settings):
        return 0.0
    return settings.weight_decay


def _in_stage2(step: int, total: int, settings: OptimizerConfig) -> bool:
    return step >= settings.stage2_start * total
