"""`qsparse bench scaling` with two processes on a CPU, and its arithmetic."""

import subprocess
import sys

import pytest
import torch

from pipeline.bench.overlap import overlap
from pipeline.bench.results import read_csv
from pipeline.bench.scaling import COLUMNS, KEYS, efficiency, scaling_table
from tests.testing import ROOT, rank_environment


def bench_scaling(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "bench", "scaling", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=rank_environment()
    )


def test_one_process_and_two(tmp_path):
    folder = tmp_path / "bench"
    folder.with_suffix(".md").write_text("<!-- bench: scaling -->\n<!-- end -->\n")
    options = ["--device", "cpu", "--shapes", "tiny", "--variants", "qsparse-bitnet", "--layouts", "dp=2", "tp=2"]
    process = bench_scaling(*options, "--steps", "2", "--warmup-steps", "1", "--output", str(folder))
    assert process.returncode == 0, process.stdout + process.stderr
    rows = read_csv(folder / "scaling.csv").rows
    assert tuple(rows[0]) == COLUMNS
    assert [tuple(row[key] for key in KEYS[2:]) for row in rows] == [("1", "1", "2"), ("2", "1", "2"), ("1", "2", "4")]
    assert all(row["absent"] == "" for row in rows)
    tokens = [float(row["tokens_per_s_per_gpu"]) * float(row["ms_per_step"]) / 1e3 for row in rows]
    assert tokens == pytest.approx([2 * 32] * 3, rel=0.02), "per process"
    page = folder.with_suffix(".md").read_text()
    assert "| tiny | qsparse-bitnet | TP=2 |" in page and "(bench/scaling.png)" in page
    assert (folder / "scaling.png").stat().st_size > 10_000


def test_what_cannot_be_measured_is_named(tmp_path):
    options = ["--device", "cpu", "--shapes", "tiny", "--variants", "naive", "--layouts", "tp=2"]
    process = bench_scaling(*options, "--total-seconds", "0", "--output", str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
    reasons = [row["absent"] for row in read_csv(tmp_path / "scaling.csv").rows]
    assert reasons == ["left out: needs whole weights, tp=1", "left out: 0 seconds were over"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_bad_requests_are_told():
    assert "'pp=2': expected sizes of dp and tp, such as dp=2" in bench_scaling("--layouts", "pp=2").stderr
    assert "--layouts: needs 8 CUDA GPUs, found none" in bench_scaling("--layouts", "dp=4,tp=2").stderr
    assert "--variants sparse: expected some of dense, te-bf16" in bench_scaling("--variants", "sparse").stderr


def row(**values: str) -> dict[str, str]:
    return {**dict.fromkeys(COLUMNS, ""), "shape": "350m", "variant": "dense", "dp": "1", "tp": "1", **values}


def test_efficiency_compares_equal_work_per_gpu():
    rows = [
        row(micro_batch="8", tokens_per_s_per_gpu="100"),
        row(micro_batch="16", tokens_per_s_per_gpu="110"),
        row(micro_batch="8", dp="2", tokens_per_s_per_gpu="95", communication_ms="9.0", exposed_ms="1.0"),
        row(micro_batch="32", tp="2", tokens_per_s_per_gpu="88"),
        row(micro_batch="64", tp="2", absent="failed: out of memory"),
    ]
    assert [efficiency(one, rows) for one in rows[:4]] == ["100.0%", "100.0%", "95.0%", "80.0%"]
    lines = scaling_table(rows).splitlines()
    assert lines[4] == "| 350m | dense | DP=2 | 95 | 95.0% |  ( to ) | 9.0 | 1.0 |  |  |"
    assert lines[6].startswith("| 350m | dense | TP=2 | failed: out of memory |")


def test_exposed_communication():
    """0...4 and 6...9 are sent, 1...3, 2...5 and 8...10 computed: nothing runs beside 0...1 and 6...8."""
    found = overlap([(6, 9), (0, 3), (2, 4)], [(8, 10), (1, 3), (2, 5)])
    assert found == (7, 3)
    assert overlap([], [(0, 1)]) == (0, 0)
    assert overlap([(0, 1)], []) == (1, 1)
