"""Every reader of the benchmarks gives the corpus, and the scale table is the arithmetic it claims."""

import csv
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.bench import data as bench
from pipeline.bench.data_formats import make_documents, write_all
from pipeline.bench.data_readers import READERS, measure
from pipeline.bench.data_scale import Job, rows

LENGTH = 256
NEEDS = {"Energon, chunks": "megatron.energon", "MosaicML Streaming": "streaming"}


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    missing = write_all(folder, make_documents(1_500_000), LENGTH)
    assert set(missing) == {
        name for name, module in {"energon": "megatron.energon", "mds": "streaming"}.items() if not is_installed(module)
    }
    return folder


@pytest.fixture(scope="module")
def corpus(formats: Path) -> tuple[np.ndarray, dict[bytes, int]]:
    """All tokens, and where each run of eight of them begins."""
    flat = np.fromfile(formats / "flat.bin", dtype=np.uint16)
    return flat, {flat[i : i + 8].tobytes(): i for i in range(len(flat) - LENGTH)}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_sequences_of_the_corpus(
    formats: Path, corpus: tuple[np.ndarray, dict[bytes, int]], reader: str
) -> None:
    if not is_installed(NEEDS.get(reader, "numpy")):
        pytest.skip(f"{NEEDS[reader]} is not installed")
    flat, starts = corpus
    found = inside = 0
    for sequence in itertools.islice(READERS[reader](formats, LENGTH), 200):
        assert (sequence.shape, sequence.dtype) == ((LENGTH + 1,), np.int64)
        tokens = sequence.astype(np.uint16)
        begin = starts.get(tokens[:8].tobytes())
        found += begin is not None
        inside += begin is not None and np.array_equal(flat[begin : begin + LENGTH + 1], tokens)
    # Loaders that shuffle documents cut across two of them in some sequences.
    assert found > 180
    assert inside > (100 if "documents" in reader or "Megatron" in reader else 195)


def test_a_reader_that_gives_something_else_is_not_measured() -> None:
    wrong = itertools.repeat(np.zeros(LENGTH, dtype=np.int64))
    with pytest.raises(ValueError, match=r"expected int64 \[257\], got int64 \(256,\)"):
        measure(wrong, LENGTH, 1000, 1000)


def test_results_are_written_with_what_is_absent(tmp_path: Path) -> None:
    results = [
        bench.Result("ours", 256, [2e8, 1e8, 3e8]),
        bench.Result("MosaicML Streaming", 256, absent="not installed"),
    ]
    bench.write_csv(tmp_path / "data.csv", results, "corpus of a test")
    lines = (tmp_path / "data.csv").read_text().splitlines()
    assert "# corpus: corpus of a test" in lines
    table = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(row["median_mtokens_per_cpu_second"], row["lowest"], row["highest"], row["absent"]) for row in table] == [
        ("200.00", "100.00", "300.00", ""),
        ("", "", "", "not installed"),
    ]
    assert bench.markdown(results).splitlines() == [
        "| million tokens per CPU-second | seq_length 256 |",
        "| --- | --- |",
        "| ours | 200 |",
        "| MosaicML Streaming | not installed |",
    ]
    bench.plot(tmp_path / "data.png", results)
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "bench", "data", "--output", str(tmp_path), "--megatokens", "1"]
    readers = ["--readers", "ours", "memmap (limit)"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--seq-length", "256", *readers], capture_output=True, text=True, check=True
    )
    assert "Mtokens per CPU-second" in done.stdout
    rows_ = list(csv.DictReader(line for line in (tmp_path / "data.csv").open() if not line.startswith("#")))
    assert [row["reader"] for row in rows_] == ["ours", "memmap (limit)"]
    assert all(float(row["median_mtokens_per_cpu_second"]) > 0 for row in rows_)


def test_the_scale_table() -> None:
    job = Job(1e9, 64, 8, 8, 1000, 64, 8e6, 10**6, 2)
    table = {name: ours for name, ours, _ in rows(job)}
    # 8 replicas read 1 M tokens/s each: one chunk of 2 MB per second and replica; 1000 chunks in 4 shards.
    assert table["requests per reader and second"] == "1.000"
    assert table["requests of the job per second"] == "8"
    assert table["bytes per request"] == "2.0 MB"
    assert table["GB/s of the job"] == "0.02"
    assert table["opens at the start, whole job"] == f"{2 * 64 + 2 * 4}"
    assert table["chunks open per reader"] == "32"
