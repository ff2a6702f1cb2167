"""Packing: the same bins as a plain best-fit-decreasing, and a dataset in which only long documents are cut."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.info import document_statistics
from pipeline.data.loader import SourceFiles
from pipeline.data.options import PrepareOptions
from pipeline.data.packing import best_fit_decreasing, pack_documents
from pipeline.data.prepare import PrepareResult, prepare
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.verify import verify_dataset
from tests.data import reading

SEQ_LENGTH = 128


def reference_bins(lengths: list[int], capacity: int) -> list[int]:
    """Fill of every bin of best-fit-decreasing, written as in a textbook."""
    fills: list[int] = []
    for size in sorted(((length - 1) % capacity + 1 for length in lengths), reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + size <= capacity]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += size
        else:
            fills.append(size)
    return sorted(fills)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 40))
def test_bins_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(number for members in bins for number in members) == list(range(len(lengths)))
    fills = [sum((lengths[i] - 1) % capacity + 1 for i in members) for members in bins]
    assert sorted(fills) == reference_bins(lengths, capacity)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(2, 30), st.integers(1, 200))
def test_chunks_hold_whole_windows_and_every_document(lengths: list[int], seq_length: int, chunk_tokens: int) -> None:
    documents = [np.append(np.full(length - 1, number + 1), 0) for number, length in enumerate(lengths)]
    chunks = list(
        pack_documents(
            [(document, document.size) for document in documents],
            seq_length=seq_length,
            chunk_tokens=chunk_tokens,
            eod_id=0,
        )
    )
    assert sum(chunk.padding for chunk in chunks) == sum(chunk.tokens.size for chunk in chunks) - sum(lengths)
    assert sum(chunk.text_bytes for chunk in chunks) == sum(lengths)
    assert all(chunk.tokens.size > chunk_tokens for chunk in chunks[:-1])
    found = []
    for chunk in chunks:
        assert chunk.tokens.size % seq_length == 1
        assert chunk.doclens.sum() == chunk.tokens.size
        for start, piece in zip(
            np.cumsum(chunk.doclens) - chunk.doclens,
            np.split(chunk.tokens, np.cumsum(chunk.doclens)[:-1]),
            strict=True,
        ):
            document = np.append(piece[piece != 0], 0)
            assert (piece[document.size :] == 0).all()
            crossed = (start + document.size - 1) // seq_length - start // seq_length
            assert crossed == (document.size - 1) // seq_length, "no more cuts than its length demands"
            found.append(document.tolist())
    assert sorted(found) == sorted(document.tolist() for document in documents)


def run(output: Path, source: Path, *, workers: int = 1, **options: Any) -> PrepareResult:
    given_options = {"vocab_size": 300, "chunk_tokens": 2048, "shard_tokens": 20_000, "val_share": 0.1, **options}
    return prepare(
        PrepareOptions(output=output, sources=(str(source),), **given_options), workers=workers, stream=io.StringIO()
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six hundred documents, some longer than a window."""
    random = np.random.default_rng(0)
    path = tmp_path / "source.jsonl"
    lines = [" ".join(f"word{number % 97}" for number in range(length)) for length in random.geometric(0.05, 600)]
    path.write_text("".join(json.dumps({"text": f"{number}: {line}"}) + "\n" for number, line in enumerate(lines)))
    return path


def test_packed_dataset(source: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "packed", source, pack_seq_length=SEQ_LENGTH)
    plain = run(tmp_path / "plain", source)
    assert result.manifest.packing is not None
    assert result.manifest.packing.seq_length == SEQ_LENGTH
    assert '"packing"' not in (tmp_path / "plain" / "dataset.json").read_text()
    tokenizer = load_tokenizer(tmp_path / "packed")
    for split in ("train", "val"):
        texts = [
            sorted(tokenizer.decode(ids.tolist()) for ids in reading.read_documents(tmp_path / name, split))
            for name in ("packed", "plain")
        ]
        assert texts[0] == texts[1], "no token is lost"
    added = sum(
        packed.tokens - unpacked.tokens
        for split in ("train", "val")
        for packed, unpacked in zip(result.manifest.splits[split], plain.manifest.splits[split], strict=True)
    )
    assert result.padding == added
    assert verify_dataset(tmp_path / "packed", workers=1, stream=io.StringIO()) == []


def test_only_long_documents_are_cut(source: Path, tmp_path: Path) -> None:
    run(tmp_path / "packed", source, pack_seq_length=SEQ_LENGTH)
    run(tmp_path / "plain", source)
    cut = {
        name: sum(
            is_cut
            for tokens, doclens in reading.read_chunks(tmp_path / name, "train")
            for is_cut in cut_though_fitting(tokens, doclens)
        )
        for name in ("packed", "plain")
    }
    assert cut["packed"] == 0
    assert cut["plain"] > 100
    statistics = document_statistics(SourceFiles(tmp_path / "packed"), "train")
    too_long = [len(document) > SEQ_LENGTH for document in reading.read_documents(tmp_path / "plain", "train")]
    assert statistics.cut(SEQ_LENGTH).sum() == sum(too_long) > 5
    assert not (statistics.cut(SEQ_LENGTH) & (statistics.inputs <= SEQ_LENGTH)).any()


def cut_though_fitting(tokens: np.ndarray, doclens: np.ndarray) -> list[bool]:
    """For every document of a chunk: whether a window's edge cuts it although it would fit."""
    starts = np.cumsum(doclens) - doclens
    result = []
    for start, length in zip(starts.tolist(), doclens.tolist(), strict=True):
        padding = int((tokens[start : start + length] == 0).sum()) - 1
        last = start + length - padding - 1
        result.append(length - padding <= SEQ_LENGTH and start // SEQ_LENGTH != last // SEQ_LENGTH)
    return result


def test_packing_does_not_depend_on_workers_and_belongs_to_the_request(source: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "a", source, pack_seq_length=SEQ_LENGTH)
    run(tmp_path / "b", source, pack_seq_length=SEQ_LENGTH, workers=2)
    assert reading.files_of(tmp_path / "a") == reading.files_of(tmp_path / "b")
    assert f"--pack-seq-length {SEQ_LENGTH}" in first.manifest.command
    assert first.manifest.request != run(tmp_path / "c", source).manifest.request
