import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.metrics import METRICS, MetricsLog, layer_metric, metric_info, read_metrics, series
from tests.testing import ROOT


def test_records_come_back_in_order_with_their_values(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        time_ms = log.write({"train/loss": 5.25, "train/tokens": 4096}, 10)
        log.write({"val/loss": 5.5}, 10)
        log.write({"train/loss": 4.125, "train/tokens": 8192}, 20)
    records = read_metrics(path)
    assert records[0] == {"step": 10, "time_ms": time_ms, "train/loss": 5.25, "train/tokens": 4096.0}
    assert series(records, "train/loss") == ([10, 20], [5.25, 4.125])
    assert series(records, "val/loss") == ([10], [5.5])


def test_nonfinite_values_are_strict_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read_metrics(path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_each_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from pipeline.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(1, 8): log.write({'train/loss': step / 2}, step)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT).returncode == -9
    assert series(read_metrics(path), "train/loss")[1] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


@pytest.mark.parametrize("torn", ['{"step": 30, "time_ms": 3, "tra', '{"step": 30', '{"step"', "{"])
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 10, "time_ms": 1, "a": 1.0}\n{"step": 20, "time_ms": 2, "a": 2.0}\n'
    path.write_text(whole + torn)
    assert series(read_metrics(path), "a") == ([10, 20], [1.0, 2.0])
    with MetricsLog(path) as log:
        log.write({"a": 3.0}, 30)
    assert path.read_text().startswith(whole)
    assert series(read_metrics(path), "a") == ([10, 20, 30], [1.0, 2.0, 3.0])


def test_a_last_record_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "time_ms": 1, "a": 1.0}')
    with MetricsLog(path) as log:
        log.write({"a": 2.0}, 20)
    assert series(read_metrics(path), "a") == ([10, 20], [1.0, 2.0])


@pytest.mark.parametrize(
    "line", ["garbage", '{"time_ms": 1}', '{"step": "x", "time_ms": 1}', "[1]", '{"step": 1, "a": []}']
)
def test_a_broken_line_elsewhere_is_an_error_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "time_ms": 1}}\n{line}\n{{"step": 3, "time_ms": 1}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a metrics record"):
        read_metrics(path)


def test_rewind_drops_what_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30, 40):
        log.write({"a": step}, step)
    assert log.rewind(20) == 2
    log.write({"a": 31}, 30)
    assert log.rewind(30) == 0
    log.close()
    assert series(read_metrics(path), "a") == ([10, 20, 30], [10.0, 20.0, 31.0])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_metric_may_not_take_the_records_own_names(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="metric name 'step' is taken"):
        log.write({"step": 1.0}, 1)


def test_the_table_knows_every_name_and_no_other() -> None:
    assert metric_info("val/loss").unit == "nat/token"
    name = layer_metric("decoder.layers.11.mlp.experts.linear_fc1", "sparsity")
    assert metric_info(name).meaning == "share of zeros in this layer's input"
    with pytest.raises(ValueError, match=r"metric 'train/los' is unknown; known: train/loss, "):
        metric_info("train/los")
    assert len({info.name for info in METRICS}) == len(METRICS)


def test_the_documentation_has_the_table_as_it_is() -> None:
    text = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    documented = [
        line
        for line in text.splitlines()
        if line.startswith(
            (
                "| `train/",
                "| `val/",
                "| `data/",
                "| `perf/",
                "| `mem/",
                "| `qsparse/",
                "| `moe/",
                "| `layer_",
                "| `system/",
            )
        )
    ]
    assert documented == [f"| `{info.name}` | {info.unit} | {info.meaning} |" for info in METRICS]
