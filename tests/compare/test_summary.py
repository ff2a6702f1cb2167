import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.compare.plots import expert_shares, smoothed
from pipeline.compare.runs import load_runs
from pipeline.compare.summary import (
    cautions,
    check_comparable,
    count,
    differences,
    equal_tokens,
    mean_before,
    results_table,
    summarize,
)
from pipeline.metrics import MetricsLog
from pipeline.sizes import flops_per_token
from tests.compare.writing import TOKENS_PER_STEP, write_run


def test_losses_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    short = write_run(tmp_path, "short", steps=50, sparsity=0.4)
    wide = write_run(tmp_path, "wide", steps=100, batch=2, loss=3.0)
    runs = load_runs([short, wide])
    tokens = equal_tokens(runs)
    assert tokens == 50 * TOKENS_PER_STEP
    first, second = (summarize(run, tokens) for run in runs)
    assert first.val_loss == pytest.approx(4.5 + 100 / 50)
    assert first.train_loss == pytest.approx(4.0 + np.mean([100 / step for step in range(45, 51)]))
    # 50 x 4096 tokens are 25 of its steps; the last evaluation until then was at step 20.
    assert second.val_loss == pytest.approx(3.5 + 100 / 20)
    assert second.train_loss == pytest.approx(3.0 + np.mean([100 / step for step in (23, 24, 25)]))
    assert (second.final_val_loss, second.best_val_loss) == pytest.approx((4.5, 4.5))
    assert second.best_val_tokens == 100 * 2 * TOKENS_PER_STEP
    assert (first.activated_parameters, first.sparsity) == pytest.approx((0.6e6, 0.4))
    assert (first.tokens_per_second, first.tokens_per_second_per_device) == pytest.approx((1000.5, 500.25))
    assert (first.data_wait, second.peak_bytes) == pytest.approx((0.1, 2.0**31))
    table = results_table([first, second], tokens)
    assert table.rows[0][:5] == ("short", "completed", "50", "204.80k", "6.5000")
    assert table.rows[0][5] == f"{math.exp(6.5):.2f}"


def test_best_and_final_differ_where_a_run_got_worse(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", steps=20)
    with MetricsLog(path / "metrics.jsonl") as log:
        log.write({"val/loss": 99.0, "train/tokens": 21.0 * TOKENS_PER_STEP}, 21)
        log.write({"val/loss": math.nan, "train/tokens": 22.0 * TOKENS_PER_STEP}, 22)
    (run,) = load_runs([path])
    summary = summarize(run, math.inf)
    assert (summary.best_val_loss, summary.final_val_loss) == pytest.approx((9.5, 99.0))


def test_operations_leave_out_what_zero_inputs_spare(tmp_path: Path) -> None:
    dense, sparse = load_runs([write_run(tmp_path, "d"), write_run(tmp_path, "s", sparsity=0.4)])
    assert dense.config is not None and dense.operations is not None and sparse.operations is not None
    per_token, tokens = flops_per_token(dense.config, 1000), 100 * TOKENS_PER_STEP
    assert dense.operations.needed[-1] == pytest.approx(per_token * tokens)
    assert sparse.operations.dense[-1] == pytest.approx(per_token * tokens)
    # Of 6 operations per weight and token, 4 are spared for 40 % of the 1e6 weights.
    assert sparse.operations.needed[-1] == pytest.approx((per_token - 4 * 0.4e6) * tokens)


def test_what_differs(tmp_path: Path) -> None:
    a = write_run(tmp_path, "a", optimizer={"lr": 1e-3})
    b = write_run(
        tmp_path, "b", optimizer={"lr": 2e-3}, tracking={"parent": "x"}, state="failed", data={"path": "other"}
    )
    runs = load_runs([a, b])
    assert differences(runs).columns == ("key", "a", "b")
    assert differences(runs).rows == (("data.path", "data/stdlib", "other"), ("optimizer.lr", "0.001", "0.002"))
    assert cautions(runs) == [
        "The runs read different data, so their held-out losses are of different texts.",
        "Not completed: b (failed).",
    ]


def test_runs_that_cannot_be_compared_say_what_they_have(tmp_path: Path) -> None:
    train = write_run(tmp_path, "train", metrics=("train/loss", "train/tokens"))
    val = write_run(tmp_path, "val", metrics=("val/loss", "train/tokens"))
    no_tokens = write_run(tmp_path, "steps", metrics=("train/loss",))
    with pytest.raises(ValueError, match="no loss over tokens in common: train has train/loss; val has val/loss"):
        check_comparable(load_runs([train, val]))
    with pytest.raises(ValueError, match="steps has train/loss and no train/tokens"):
        check_comparable(load_runs([train, no_tokens]))
    with pytest.raises(ValueError, match="takes two runs or more, found train; `qsparse report` draws one"):
        check_comparable(load_runs([train]))


def test_runs_of_the_same_name_and_of_older_versions(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder, "run") for folder in ("x", "y")]
    (paths[1] / "config.yaml").write_text("model: {layers: 3}\n")
    runs = load_runs(paths)
    assert [run.name for run in runs] == ["x/run", "y/run"]
    assert runs[1].config is None and runs[1].operations is None and runs[1].settings == {"model.layers": "3"}
    check_comparable(runs)
    assert any("Without a configuration that loads: y/run" in note for note in cautions(runs))


def test_expert_loads_are_relative_to_the_layers_mean(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path, "moe", steps=3, experts=12)])
    grid = expert_shares(run.records)
    assert grid is not None
    experts, steps, shares = grid
    assert [name.rpartition(" ")[2] for name in experts] == [str(i) for i in range(12)] and steps == [1, 2, 3]
    np.testing.assert_allclose(shares[:, 0], np.arange(1, 13) / 6.5)


def test_small_functions(tmp_path: Path) -> None:
    np.testing.assert_allclose(smoothed(np.array([1.0, 3.0, 5.0, 7.0]), 2), [1, 2, 4, 6])
    assert [count(n) for n in (12, 983_040, 1.36e9)] == ["12", "983.04k", "1.36B"]
    (run,) = load_runs([write_run(tmp_path, "a", steps=10)])
    assert mean_before(run.curve("train/loss"), 1.0) is None
