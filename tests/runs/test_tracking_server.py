"""One real MLflow server: killed and restarted, slow, losing replies; its page in a browser."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run_directory import RunDirectory
from pipeline.track_sync import replay
from tests.compare.writing import write_run
from tests.runs.chromium import open_browser
from tests.runs.mlflow_tools import Incarnation, Proxy, Server, fetch_run, history, make_config, wait_until
from tests.testing import ROOT

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not yet started: the first test wants it dead."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def running(server: Server) -> Server:
    if not server.is_running:
        server.start()
    return server


def test_nothing_is_lost_or_doubled_while_the_server_comes_and_goes(tmp_path: Path, server: Server) -> None:
    config = make_config(tmp_path, uri=server.uri)
    run = Incarnation(config, uri=server.uri, in_process=False)

    def record(first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.record(step, {"train/loss": 1.0 / step, "train/lr": 1e-3, "train/tokens": step * 4096.0})

    record(1, 100)  # nobody listens yet
    assert run.tracker.undelivered == 300
    server.start()
    wait_until(lambda: run.tracker.undelivered == 0, 180, "delivery after the start")
    record(101, 200)
    server.kill()  # somewhere in the middle of a delivery
    record(201, 300)
    server.start()
    wait_until(lambda: run.tracker.undelivered == 0, 180, "delivery after the restart")
    record(301, 310)
    assert run.tracker.close() == 0

    expected = [(step, 1.0 / step) for step in range(1, 311)]
    assert history(server.store, run.directory, "train/loss") == expected
    assert history(server.store, run.directory, "train/tokens") == [(s, s * 4096.0) for s in range(1, 311)]
    assert history(server.store, run.directory, "tokens/train_loss") == [(s * 4096, loss) for s, loss in expected]
    found = fetch_run(server.store, run.directory)
    assert found.info.status == "FINISHED"
    assert run.tracker.location == f"{server.uri}/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}"
    (artifacts,) = server.artifacts.glob(f"*/{found.info.run_id}/artifacts")
    assert (artifacts / "config.yaml").read_text() == run.directory.config.read_text()
    assert replay(run.directory) == 0, "the copy is complete"


def test_a_server_that_takes_seconds_for_every_request(tmp_path: Path, running: Server) -> None:
    proxy = Proxy(running.port, delay_s=1.0)
    run = Incarnation(make_config(tmp_path, "slow"), uri=proxy.uri)
    for step in range(1, 501):
        run.record(step, {"train/loss": 1.0 / step})
    assert run.tracker.undelivered == 500, "the loop is over before the first request is answered"
    assert run.tracker.close(timeout_s=120) == 0
    proxy.close()
    assert history(running.store, run.directory, "train/loss") == [(step, 1.0 / step) for step in range(1, 501)]
    assert fetch_run(running.store, run.directory).info.status == "FINISHED"


def test_replies_that_get_lost_double_nothing(tmp_path: Path, running: Server) -> None:
    import mlflow

    # Among them those to the creation of the run and of its parent.
    proxy = Proxy(running.port, lose={2, 3, 5, 8, 12, 14, 17, 20, 22, 24})
    run = Incarnation(make_config(tmp_path, "lossy", parent="lossy-sweep"), uri=proxy.uri)
    for step in range(1, 3001):
        run.record(step, {"train/loss": 1.0 / step})
    assert run.tracker.close(timeout_s=120) == 0
    proxy.close()
    assert proxy.lost == 10
    assert history(running.store, run.directory, "train/loss") == [(step, 1.0 / step) for step in range(1, 3001)]
    names = [found.info.run_name for found in mlflow.MlflowClient(running.store).search_runs(["1"])]
    assert (names.count("lossy"), names.count("lossy-sweep")) == (1, 1)


def test_eight_runs_at_once(tmp_path: Path, running: Server) -> None:
    runs = [Incarnation(make_config(tmp_path, f"of-8-{i}", parent="eight"), uri=running.uri) for i in range(8)]
    for step in range(1, 101):
        for number, run in enumerate(runs):
            run.record(step, {"train/loss": number + 1.0 / step, "train/tokens": 100.0 * step})
    assert [run.tracker.close(timeout_s=180) for run in runs] == [0] * 8
    for number, run in enumerate(runs):
        expected = [(step, number + 1.0 / step) for step in range(1, 101)]
        assert history(running.store, run.directory, "train/loss") == expected
    found = [fetch_run(running.store, run.directory) for run in runs]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in found}) == 1


def test_the_page_of_a_run_in_a_browser(tmp_path: Path, running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Incarnation(make_config(tmp_path, "pictured"), uri=running.uri)
    for step in range(1, 31):
        run.record(step, {"train/loss": 8.0 - step / 10, "train/tokens": 4096.0 * step, "val/loss": 8.0})
    assert run.tracker.close() == 0
    found = fetch_run(running.store, run.directory).info
    with open_browser(monkeypatch, 1400, 1600) as browser:
        from mlflow_page import SETTINGS, page_url  # type: ignore[import-not-found]

        browser.call("Page.addScriptToEvaluateOnNewDocument", source=SETTINGS)
        browser.open(page_url(running.uri, "run-charts", found.experiment_id, [found.run_id]))
        browser.wait_for("[...document.querySelectorAll('.scatterlayer .js-line')].length >= 4", timeout_s=60)
        text = browser.evaluate("document.body.innerText")
        lengths = browser.evaluate("[...document.querySelectorAll('.js-line')].map(line => line.getTotalLength())")
        axis = browser.evaluate("[...document.querySelectorAll('.xtick text')].map(tick => tick.textContent)")
    assert [name for name in ("pictured", "train_loss", "val_loss", "tokens") if name not in text] == []
    assert sum(length > 50 for length in lengths) >= 3, "curves, not points"
    assert "100k" in axis, "the token axis"


def test_the_page_of_a_comparison_in_a_browser(
    tmp_path: Path, running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sparsity in (("dense", 0.0), ("sparse", 0.4)):
        run = write_run(tmp_path, name, sparsity=sparsity, loss=4 + sparsity, tracking={"uri": running.uri})
        assert replay(RunDirectory(run)) > 0
    command = [sys.executable, "-m", "launch", "compare", "dense", "sparse", "--root", str(tmp_path)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": running.uri}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    run_id = result.stdout.split()[-1]
    with open_browser(monkeypatch, 1500, 1100) as browser:
        from mlflow_page import SETTINGS, page_url

        browser.call("Page.addScriptToEvaluateOnNewDocument", source=SETTINGS)
        browser.open(f"{page_url(running.uri, 'run', '1', [run_id])}/artifacts/report.html")
        browser.wait_for("document.querySelector('iframe')?.clientHeight > 300", timeout_s=120)
        text = browser.evaluate("document.body.innerText")
    expected = ("compare: dense, sparse", "report.html", "figures", "summary.json", "tables.md")
    assert [name for name in expected if name not in text] == []
