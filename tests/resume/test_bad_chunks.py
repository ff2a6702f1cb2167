"""A run that goes around damaged chunks: the same batches under every layout, recorded, and told."""

import json

import pytest

from pipeline.metrics import read_metrics
from tests.resume.conftest import Starts


def bad_chunks(starts: Starts, name: str, step: int) -> list[tuple]:
    meta = json.loads((starts.run(name).checkpoint(step) / "meta.json").read_text())
    return [tuple(chunk[:3]) for chunk in meta["bad_chunks"]]


@pytest.mark.parametrize("name", ["skip-dp2", "skip-pp2"])
def test_a_resume_under_another_layout_reads_the_same_batches(starts: Starts, name: str) -> None:
    found, expected = starts.run(name), starts.run("skip")
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)
    assert found.val_losses[-1] == pytest.approx(expected.val_losses[-1], rel=1e-12)
    assert bad_chunks(starts, name, 8) == bad_chunks(starts, "skip", 8)


def test_the_substitutes_are_other_data(starts: Starts) -> None:
    assert starts.run("skip").losses[0] != starts.run("plain").losses[0]
    assert starts.run("skip").losses[0] == pytest.approx(starts.run("plain").losses[0], abs=0.2)


def test_bad_chunks_are_in_checkpoints_metrics_and_the_log(starts: Starts) -> None:
    assert len(bad_chunks(starts, "skip", 8)) == 2
    assert set(bad_chunks(starts, "skip", 2)) <= set(bad_chunks(starts, "skip", 8))
    assert len(bad_chunks(starts, "skip", 2)) >= 1
    records = read_metrics(starts.run("skip").path / "metrics.jsonl")
    assert [record["data/bad_chunks"] for record in records if "data/bad_chunks" in record] == [1.0, 2.0]
    log = (starts.run("skip").path / "logs" / "rank-00000.log").read_text()
    assert log.count("other windows take the place of") == 2
    assert "crc32 is" in log and "skip-data/train-" in log
