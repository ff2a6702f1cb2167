import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pipeline.figures import (
    curves_figure,
    layer_grid,
    layers_figure,
    loss_figure,
    plot_run,
    results_table,
)
from pipeline.metrics import MetricsLog, read_metrics


def write_run(folder: Path, *, scale: float = 1.0, config: str = "a: 1\n", layers: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(10, 201, 10):
            record = {"train/loss": scale * 8.0 / step, "train/lr": step * 1e-5, "train/weight_decay": 0.1}
            record |= {
                "train/grad_norm": 1.0 / step,
                "train/tokens": 4096.0 * step,
                "perf/tokens_per_second": 1000.0 + step,
            }
            if layers:
                record |= {f"layer_sparsity/decoder.layers.{i}.linear_fc1": i / 20 for i in range(12)}
                record |= {"qsparse/sparsity": 0.25, "qsparse/ternary_zeros": 0.3}
            log.write(record, step)
            if step % 100 == 0:
                log.write({"val/loss": scale * 9.0 / step, "val/perplexity": math.exp(scale * 9.0 / step)}, step)
    return folder


def test_loss_figure_draws_the_logged_values_over_both_axes(tmp_path: Path) -> None:
    figure = loss_figure(read_metrics(write_run(tmp_path / "run") / "metrics.jsonl"))
    assert figure is not None
    by_step, by_token = figure.axes
    train, val = by_step.lines
    steps = np.arange(10, 201, 10)
    np.testing.assert_array_equal(train.get_xdata(), steps)
    np.testing.assert_allclose(train.get_ydata(), 8.0 / steps)
    np.testing.assert_array_equal(val.get_xdata(), [100, 200])
    np.testing.assert_allclose(val.get_ydata(), [0.09, 0.045])
    np.testing.assert_allclose(by_token.lines[0].get_xdata(), steps * 4096)
    np.testing.assert_allclose(by_token.lines[1].get_xdata(), [409_600, 819_200])
    assert (by_step.get_xlabel(), by_step.get_ylabel()) == ("optimizer step", "loss [nat/token]")
    assert by_token.get_xlabel() == "tokens"


def test_schedule_and_gradient_norm(tmp_path: Path) -> None:
    records = read_metrics(write_run(tmp_path / "run") / "metrics.jsonl")
    schedule = curves_figure(records, ("train/lr", "train/weight_decay"))
    assert schedule is not None
    lr, weight_decay = schedule.axes
    np.testing.assert_allclose(lr.lines[0].get_ydata(), np.arange(10, 201, 10) * 1e-5)
    np.testing.assert_allclose(weight_decay.lines[0].get_ydata(), 0.1)
    norm = curves_figure(records, ("train/grad_norm",), log=True)
    assert norm is not None and norm.axes[0].get_yscale() == "log"
    assert curves_figure(records, ("train/unknown",)) is None


def test_layer_heat_map_holds_every_layer_in_natural_order(tmp_path: Path) -> None:
    records = read_metrics(write_run(tmp_path / "run") / "metrics.jsonl")
    grid = layer_grid(records, "sparsity")
    assert grid is not None
    layers, steps, values = grid
    assert layers == [f"decoder.layers.{i}.linear_fc1" for i in range(12)]
    assert steps == list(range(10, 201, 10))
    np.testing.assert_allclose(values, np.repeat(np.arange(12)[:, None] / 20, 20, axis=1))
    assert layer_grid(records, "ternary_zeros") is None
    figure = layers_figure(records)
    assert figure is not None
    heat_map, _colour_bar = figure.axes
    np.testing.assert_allclose(heat_map.collections[0].get_array(), values)
    assert [label.get_text() for label in heat_map.get_yticklabels()] == layers


def test_a_layer_missing_from_a_record_is_a_gap() -> None:
    records = [
        {"step": 1, "time_ms": 0, "layer_sparsity/a": 0.5, "layer_sparsity/b": 0.25},
        {"step": 3, "time_ms": 0, "layer_sparsity/b": 0.75},
    ]
    grid = layer_grid(records, "sparsity")
    assert grid is not None
    np.testing.assert_array_equal(grid[2], [[0.5, math.nan], [0.25, 0.75]])
    assert layers_figure(records[:1]) is not None, "one record is enough"


def test_plot_run_writes_what_was_logged_and_depends_on_it(tmp_path: Path) -> None:
    first = plot_run(write_run(tmp_path / "a") / "metrics.jsonl", tmp_path / "a" / "figures")
    assert [path.name for path in first] == ["loss.png", "schedule.png", "grad_norm.png", "layers.png"]
    dense = plot_run(write_run(tmp_path / "b", scale=2.0, layers=False) / "metrics.jsonl", tmp_path / "b" / "figures")
    assert [path.name for path in dense] == ["loss.png", "schedule.png", "grad_norm.png"]
    pictures = [imread(path) for path in (first[0], dense[0], first[1], dense[1])]
    assert pictures[0].std() > 0.02, "not an empty page"
    assert not np.array_equal(pictures[0], pictures[1]), "other losses, other picture"
    np.testing.assert_array_equal(pictures[2], pictures[3], "same schedule, same picture")


def test_plot_run_of_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no records"):
        plot_run(tmp_path / "metrics.jsonl", tmp_path)


def test_results_table(tmp_path: Path) -> None:
    records = read_metrics(write_run(tmp_path / "qsparse") / "metrics.jsonl")
    mean, perplexity = (8 / 190 + 8 / 200) / 2, math.exp(0.045)
    row = f"| qsparse | 200 | 819,200 | {mean:.4f} | 0.0450 | {perplexity:.2f} | 1,105 | 25.0% | 30.0% |"
    assert row in results_table("qsparse", records).splitlines()
