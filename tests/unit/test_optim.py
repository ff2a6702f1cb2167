"""Schedules against hand-computed values, and our FusedAdam against torch's AdamW."""

from typing import Any

import pytest
import torch

from pipeline.adam import FusedAdam
from pipeline.config import OptimizerConfig
from pipeline.schedule import learning_rate, weight_decay


def rates(total: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(**settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_two_stage_drops_peak_and_weight_decay_at_the_midpoint() -> None:
    config = OptimizerConfig(lr=1.5e-3, stage2_lr=1e-3, warmup_steps=10, weight_decay=0.1)
    found = rates(110, lr=1.5e-3, stage2_lr=1e-3, warmup_steps=10)
    assert found[0] == pytest.approx(1.5e-4)
    assert found[9] == found[10] == pytest.approx(1.5e-3)
    assert found[54] == pytest.approx(1.5e-3 * 56 / 100)
    assert found[55] == pytest.approx(1.0e-3 * 55 / 100)
    assert found[109] == pytest.approx(1.0e-3 * 1 / 100)
    decays = [weight_decay(step, 110, config) for step in (0, 54, 55, 109)]
    assert decays == [0.1, 0.1, 0.0, 0.0]


def test_cosine_linear_wsd_and_constant() -> None:
    shared = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 0}
    cosine = rates(100, schedule="cosine", **shared)
    assert (cosine[0], cosine[50]) == (pytest.approx(1.0), pytest.approx(0.55))
    linear = rates(100, schedule="linear", **shared)
    assert (linear[0], linear[50]) == (pytest.approx(1.0), pytest.approx(0.55))
    wsd = rates(100, schedule="wsd", wsd_decay_share=0.2, **shared)
    assert wsd[:81] == [pytest.approx(1.0)] * 81
    assert wsd[90] == pytest.approx(0.1 + 0.9 * 10 / 20)
    assert rates(100, schedule="constant", **shared) == [1.0] * 100
    assert weight_decay(99, 100, OptimizerConfig(schedule="cosine", weight_decay=0.1)) == 0.1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_adam_equals_torch_adamw(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, dtype=torch.float64, generator=generator), torch.randn(4, generator=generator).double()]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    a, b = FusedAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert a.param_groups[0]["step"] == 20
