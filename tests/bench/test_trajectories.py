"""`qsparse bench trajectories`: configurations, averages, table and figure; on the CPU training is tested elsewhere."""

import argparse

import pytest

from pipeline.bench.trajectories import CURVES, WINDOW, configuration, draw, smoothed, table
from pipeline.config import Config


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_a_valid_run_of_the_same_batches(name):
    options = argparse.Namespace(device="cuda", shape="100m", steps=500)
    config = Config.model_validate(configuration(CURVES[name], options))
    assert config.training.global_batch_size == 4
    assert config.check_world_size(CURVES[name].tp * CURVES[name].dp)


def test_averages():
    assert smoothed([1.0, 2.0, 3.0, 6.0], 2) == pytest.approx([1.5, 2.5, 4.5])
    assert smoothed([1.0, 3.0], 25) == [2.0]


def test_distance_from_the_reference(tmp_path):
    """One curve lies 0.25 above the reference from its first step to its last."""
    steps = 2 * WINDOW
    losses = {"reference": 3.0, "exact": 3.25}
    rows = [
        {
            "curve": name,
            "step": str(step),
            "loss": str(loss),
            "held_out": "2.5" if step == steps else "",
            "seconds": "1",
        }
        for name, loss in losses.items()
        for step in range(1, steps + 1)
    ]
    lines = table(rows).splitlines()
    assert lines[2] == f"| reference | {steps} | 3.0000 | 2.5 | 0.0000 | 1 |"
    assert lines[3] == f"| exact | {steps} | 3.2500 | 2.5 | 0.2500 | 1 |"
    draw(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
