"""`qsparse bench generate` on the CPU: rows, figure and page, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bench.generate_worker import VARIANTS
from pipeline.bench.results import read_csv
from tests.testing import ROOT, rank_environment


def test_models_are_compared(tmp_path: Path) -> None:
    (tmp_path / "out.md").write_text("<!-- bench: generate -->\n<!-- end -->\n")
    command = [sys.executable, "-m", "launch", "bench", "generate", "--device", "cpu", "--shapes", "tiny"]
    command += ["--rows", "1", "2", "--rounds", "2", "--output", str(tmp_path / "out")]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT, env=rank_environment()
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = read_csv(tmp_path / "out" / "generate.csv").rows
    assert [(row["rows"], row["variant"]) for row in rows] == [(n, variant) for n in "12" for variant in VARIANTS]
    times = {(row["rows"], row["variant"]): float(row["ms"]) for row in rows}
    for row in rows:
        milliseconds = float(row["ms"])
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * int(row["rows"]) / milliseconds, rel=1e-2)
        assert float(row["speedup"]) == pytest.approx(times[row["rows"], "dense"] / milliseconds, rel=1e-2)
        assert float(row["products_ms"]) > 0
    assert (tmp_path / "out" / "generate.png").stat().st_size > 10_000
    assert "| tiny qsparse-bitnet | 2 |" in (tmp_path / "out.md").read_text()
