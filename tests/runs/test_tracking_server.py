from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking import replay
from tests.runs.mlflow_tools import Incarnation, Server, fetch_run, history, make_config, wait_until

pytest.importorskip("mlflow")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_while_the_server_comes_and_goes(tmp_path: Path, server: Server) -> None:
    config = make_config(tmp_path, uri=server.uri)
    run = Incarnation(config, uri=server.uri)

    def record(first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.record(step, {"train/loss": 1.0 / step, "train/lr": 1e-3, "train/tokens": step * 4096.0})

    record(1, 100)  # nobody listens yet
    assert run.tracker.undelivered == 300
    server.start()
    wait_until(lambda: run.tracker.undelivered == 0, 90, "delivery after the start")
    record(101, 200)
    server.kill()  # somewhere in the middle of a delivery
    record(201, 300)
    server.start()
    wait_until(lambda: run.tracker.undelivered == 0, 90, "delivery after the restart")
    record(301, 310)
    assert run.tracker.close() == 0

    expected = [(step, 1.0 / step) for step in range(1, 311)]
    assert history(server.store, run.directory, "train/loss") == expected
    assert history(server.store, run.directory, "train/tokens") == [(s, s * 4096.0) for s in range(1, 311)]
    found = fetch_run(server.store, run.directory)
    assert found.info.status == "FINISHED"
    assert run.tracker.location == f"{server.uri}/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}"
    (artifacts,) = (tmp_path / "artifacts").glob("*/*/artifacts")
    assert (artifacts / "config.yaml").read_text() == run.directory.config.read_text()
    assert replay(run.directory) == 0, "the copy is complete"
