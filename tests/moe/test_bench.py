"""`qsparse bench moe` on the CPU: checks, rows, figure and page, and a mistake."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.bench.results import read_csv
from tests.testing import ROOT, rank_environment


def bench_moe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "bench", "moe", "--device", "cpu", "--rounds", "1", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT, env=rank_environment()
    )


def test_layers_are_compared(tmp_path: Path) -> None:
    (tmp_path / "out.md").write_text("<!-- bench: moe -->\n<!-- end -->\n")
    process = bench_moe("--layers", "tiny", "--output", str(tmp_path / "out"))
    assert process.returncode == 0, process.stdout + process.stderr
    rows = read_csv(tmp_path / "out" / "moe.csv").rows
    times = {row["variant"]: float(row["ms"]) for row in rows}
    assert list(times)[:4] == ["ours exact", "ours e4m3", "ours dense", "torch._grouped_mm"]
    for row in rows:
        assert float(row["tokens_per_s_per_gpu"]) == pytest.approx(64e3 / float(row["ms"]), rel=1e-2)
        assert float(row["speedup"]) == pytest.approx(times["torch._grouped_mm"] / float(row["ms"]), rel=1e-2)
    if find_spec("transformer_engine") is None:
        assert "tiny: TE GroupedLinear is left out: ModuleNotFoundError" in process.stdout
    assert (tmp_path / "out" / "moe.png").stat().st_size > 10_000
    assert "| tiny | 1 | ours exact |" in (tmp_path / "out.md").read_text()


def test_an_unknown_layer_is_named(tmp_path: Path) -> None:
    process = bench_moe("--layers", "nothing", "--output", str(tmp_path / "out"))
    assert process.returncode == 2
    assert "--layers 'nothing': expected some of top-2 of 8, 4096 -> 14336" in process.stderr
