"""`qsparse compare` as a process: what it writes, what a browser shows of it, what MLflow has of it, mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from pipeline.track_sync import replay
from tests.compare.writing import write_run
from tests.runs.chromium import open_browser
from tests.testing import ROOT


def qsparse(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment = {**inherited, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "launch", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs in `runs`."""
    for name, sparsity, loss in (("dense", 0.0, 4.0), ("qsparse", 0.4, 4.1), ("bitnet", 0.0, 4.2)):
        write_run(tmp_path / "runs", name, sparsity=sparsity, loss=loss, experts=4 if name == "qsparse" else 0)
    return tmp_path


def test_the_report_and_how_a_browser_shows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, errors = qsparse(folder, "compare", "dense", "qsparse", "bitnet")
    assert (code, errors) == (0, "")
    report = folder / "runs" / "comparisons" / "dense-qsparse-bitnet"
    assert "| dense | completed | 100 | 409.60k | 5.5000 | 244.69 |" in output
    assert output.endswith("runs/comparisons/dense-qsparse-bitnet/report.html\n")
    figures = ["loss_tokens", "loss_flops", "loss_activated", "throughput", "grad_norm"]
    heat_maps = ["layers-dense", "layers-qsparse", "experts-qsparse", "layers-bitnet"]
    assert sorted(path.stem for path in report.glob("*.png")) == sorted(figures + heat_maps)
    assert all(imread(path).std() > 0.02 for path in report.glob("*.png")), "no empty page"
    numbers = json.loads((report / "summary.json").read_text())
    assert [run["val_loss"] for run in numbers["runs"]] == pytest.approx([5.5, 5.6, 5.7])
    page = (report / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), "nothing is loaded from elsewhere"

    with open_browser(monkeypatch, 1200, 1000) as browser:
        browser.open((report / "report.html").as_uri())
        browser.wait_for("document.readyState === 'complete' && document.images.length > 0", timeout_s=30)
        assert browser.evaluate("document.title") == "dense, qsparse, bitnet: comparison"
        rows = browser.evaluate("[...document.querySelectorAll('tr[data-row]')].map(row => row.dataset.row)")
        assert rows[:6] == ["dense", "qsparse", "bitnet"] * 2
        shown = browser.evaluate("[...document.querySelectorAll('figure')].map(figure => figure.id)")
        assert shown == figures + heat_maps
        for run in ("dense", "qsparse", "bitnet"):
            for loss in ("train/loss", "val/loss"):
                curve = f"document.getElementById('loss_tokens:{run}:{loss}').querySelector('path').getTotalLength()"
                assert browser.evaluate(curve) > 100, f"the curve of {run} {loss}"
        widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == 4 and min(widths) > 300
        overflow = browser.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, "no horizontal scrolling"


def test_a_report_in_mlflow_and_a_search_in_it(folder: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    from pipeline.run_directory import RunDirectory

    for name in ("dense", "qsparse"):
        assert replay(RunDirectory(folder / "runs" / name), environment={}) > 0
    # As if `qsparse` had been trained on another machine.
    (folder / "runs" / "qsparse").rename(folder / "elsewhere")
    query = "metrics.`val/loss` < 5.65"
    code, output, errors = qsparse(folder, "compare", "--search", query, "--output", "out")
    assert (code, errors) == (0, "")
    assert "| dense | completed | 100 | 409.60k | 5.5000 |" in output
    assert re.search(r"\| qsparse-[0-9a-f]{8} \| completed \| 100 \| 409.60k \| 5.6000 \|", output)
    run_id = re.search(r"MLflow run (\w+)$", output)
    assert run_id
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    found = client.get_run(run_id[1])
    assert re.fullmatch(r"compare: dense, qsparse-[0-9a-f]{8}", found.info.run_name)
    assert found.data.metrics["val_loss/dense"] == pytest.approx(5.5)
    assert {file.path for file in client.list_artifacts(run_id[1])} >= {"report.html", "tables.md", "figures"}
    again = qsparse(folder, "compare", "--search", query, "--output", "out")
    assert again[1].endswith(f"MLflow run {run_id[1]}\n"), "the same comparison, not a second one"


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["compare", "dense", "qsparze"], {}, 2, "there is no run 'qsparze': did you mean 'qsparse'?"),
        (["compare", "dense"], {}, 2, "a comparison takes two runs or more, found dense"),
        (["compare"], {}, 2, "name the runs to compare, or give --where or --search"),
        (["compare", "--where", "state=failed"], {}, 2, "takes two runs or more, found none"),
        (["compare", "dense", "bare"], {}, 2, "no loss over tokens in common: dense has val/loss and train/loss; bare"),
        (["compare", "--search", "a"], {"MLFLOW_TRACKING_URI": "htp://x"}, 2, "MLFLOW_TRACKING_URI='htp://x' is no"),
        (["compare", "--search", "a"], {}, 2, "runs/mlflow.db does not exist: no run has been logged there"),
        (
            ["compare", "--search", "a"],
            {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
            1,
            "MLflow at http://127.0.0.1:9",
        ),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], variables: dict[str, str], code: int, message: str) -> None:
    write_run(folder / "runs", "bare", metrics=())
    result = qsparse(folder, *arguments, **variables)
    assert (result[0], result[1]) == (code, "")
    assert message in result[2] and "Traceback" not in result[2]
