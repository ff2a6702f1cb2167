"""Duplicates: what is removed is what a comparison of all pairs removes."""

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.commands import main
from pipeline.data.dedup import NUM_HASHES, choose_bands, minhash, near_duplicates, shingles
from pipeline.data.errors import DataError
from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import PrepareResult, prepare
from pipeline.data.readers import read_documents
from pipeline.data.sources import list_inputs
from pipeline.data.tokenizer import load_tokenizer
from tests.data import reading


def words_changed(text: str, share: float, seed: int) -> str:
    """The text with a share of its words replaced, one at least if any."""
    random = np.random.default_rng(seed)
    words = text.split()
    chosen = random.random(len(words)) < share
    chosen[len(words) // 2] |= share > 0
    return " ".join(f"changed{seed}" if change else word for word, change in zip(words, chosen, strict=True))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Forty documents, each followed by copies with 0.5%, 1% and 15% of the words changed."""
    files = [file for file in list_inputs(["stdlib"]) if 2000 < file.bytes < 12000][:40]
    originals = [text for file in files for text in read_documents(file)]
    shares = (0.0, 0.005, 0.01, 0.15)
    return [words_changed(text, share, seed=index) for text in originals for index, share in enumerate(shares)]


def signatures_of(texts: list[str]) -> np.ndarray:
    return np.array([minhash(shingles(text.encode())) for text in texts], dtype=np.uint32)


def jaccard(first: str, second: str) -> float:
    a, b = set(shingles(first.encode())), set(shingles(second.encode()))
    return len(a & b) / len(a | b)


def test_signatures_estimate_the_jaccard_similarity(texts: list[str]) -> None:
    signatures = signatures_of(texts)
    pairs = list(combinations(range(16), 2))
    errors = [float((signatures[a] == signatures[b]).mean()) - jaccard(texts[a], texts[b]) for a, b in pairs]
    # The estimate is a mean of 128 Bernoulli variables: 4 standard deviations are at most 4 * 0.5 / sqrt(128).
    assert max(map(abs, errors)) < 4 * 0.5 / NUM_HASHES**0.5
    assert any(0.3 < jaccard(texts[a], texts[b]) < 0.99 for a, b in pairs)


def test_near_duplicates_are_those_of_all_pairs(texts: list[str]) -> None:
    signatures = signatures_of(texts)
    removed = near_duplicates(np.array_split(signatures, [7, 50]), threshold=0.8)
    sets = [set(shingles(text.encode())) for text in texts]
    sure: set[int] = set()
    possible: set[int] = set()
    for first, second in combinations(range(len(texts)), 2):
        similarity = len(sets[first] & sets[second]) / len(sets[first] | sets[second])
        sure |= {second} if similarity >= 0.9 else set()
        possible |= {second} if similarity >= 0.7 else set()
    assert sure <= set(np.flatnonzero(removed).tolist()) <= possible
    assert len(sure) >= 40
    assert len(possible) < len(texts) - 40
    assert np.array_equal(near_duplicates([signatures], threshold=0.8), removed), "parts do not matter"


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = choose_bands(threshold)
    assert bands * rows <= NUM_HASHES
    assert 1 - (1 - threshold**rows) ** bands >= 0.98
    more = rows + 1
    assert more > 16 or 1 - (1 - threshold**more) ** (NUM_HASHES // more) < 0.98


def test_shingles() -> None:
    assert shingles(b"A b  c\nd e f") == ["a b c d e", "b c d e f"]
    assert shingles(b"two words") == ["two words"]
    assert shingles("\u7b2c\u4e09\u4e2a\u6587\u672c\u5f88\u957f".encode() * 4)[0] == " ".join(
        "\u7b2c\u4e09\u4e2a\u6587\u672c"
    )
    assert shingles(np.array([3, 1, 4, 1, 5, 9], "<u4").tobytes(), are_tokens=True) == ["3 1 4 1 5", "1 4 1 5 9"]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(tmp_path: Path, name: str, *, workers: int = 1, **options: Any) -> PrepareResult:
    sources = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    return prepare(
        PrepareOptions(output=tmp_path / name, sources=sources, vocab_size=300, val_share=0.1, **options),
        workers=workers,
        stream=io.StringIO(),
    )


def documents_of(folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return [
        tokenizer.decode(ids.tolist()) for split in ("train", "val") for ids in reading.read_documents(folder, split)
    ]


def test_exact_duplicates_are_removed_across_files(texts: list[str], tmp_path: Path) -> None:
    unique = list(dict.fromkeys(texts))
    write_lines(tmp_path / "a.jsonl", unique[:30])
    write_lines(tmp_path / "b.jsonl", [unique[40], *unique[:10], unique[40]])
    result = run(tmp_path, "out", dedup="exact")
    assert sorted(documents_of(tmp_path / "out")) == sorted([*unique[:30], unique[40]])
    assert result.manifest.dedup is not None
    assert result.manifest.dedup.model_dump() == {
        "method": "exact", "threshold": None, "documents_read": 42, "exact_removed": 11, "near_removed": 0,
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["dedup"]["exact_removed"] == 11


def test_near_duplicates_are_removed_the_first_stays(texts: list[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", texts[0:80:4])
    write_lines(tmp_path / "b.jsonl", [*texts[1:80:4], *texts[3:80:4], texts[0]])
    result = run(tmp_path, "out", dedup="near")
    removed = near_duplicates([signatures_of([*texts[0:80:4], *texts[1:80:4], *texts[3:80:4]])], threshold=0.8)
    assert result.manifest.dedup is not None
    assert (result.manifest.dedup.exact_removed, result.manifest.dedup.near_removed) == (1, int(removed.sum()))
    found = documents_of(tmp_path / "out")
    assert set(texts[0:80:4]) <= set(found), "the first of each cluster stays"
    assert len(found) == 60 - int(removed.sum())
    assert removed.sum() >= 20
    run(tmp_path, "two", dedup="near", workers=2)
    assert reading.files_of(tmp_path / "two") == reading.files_of(tmp_path / "out")


def test_command_reports_counts(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", [*texts[0:40:4], texts[0], words_changed(texts[4], 0.003, seed=9)])
    command = ["prepare", "--source", str(tmp_path / "a.jsonl"), "--vocab-size", "300", "--workers", "1"]
    assert main([*command, "--dedup", "near", "--output", str(tmp_path / "out")]) == 0
    assert "removed 1 exact duplicates, 1 near-duplicates of 12 documents" in capsys.readouterr().out


def test_threshold_needs_near(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["x"])
    write_lines(tmp_path / "b.jsonl", ["y"])
    with pytest.raises(DataError, match=r"--near-threshold 0\.7: needs --dedup near"):
        run(tmp_path, "out", dedup="exact", near_threshold=0.7)
