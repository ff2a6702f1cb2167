"""Import from and export to Megatron's indexed dataset, against megatron-core's own reader and builder."""

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pipeline.data.commands import main
from pipeline.data.errors import DataError
from pipeline.data.export import export_megatron
from pipeline.data.megatron_format import MegatronReader, MegatronWriter, megatron_dtype
from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import PrepareResult, prepare
from pipeline.data.verify import verify_dataset
from tests.data import reading

Documents = list[list[int]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with documents longer than a chunk."""
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    options = PrepareOptions(
        output=folder, max_megabytes=0.6, vocab_size=400, chunk_tokens=4096, shard_tokens=60_000, val_share=0.2
    )
    prepare(options, workers=1, stream=io.StringIO())
    return folder


def build(prefix: Path, documents: list[Documents], *, dtype: Any = np.uint16) -> Path:
    """An indexed dataset by megatron-core; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.idx")


def import_tokens(
    tmp_path: Path, prepared: Path, *sources: Path, name: str = "imported", **options: Any
) -> PrepareResult:
    return prepare(
        PrepareOptions(
            output=tmp_path / name,
            sources=tuple(map(str, sources)),
            tokenizer=prepared / "tokenizer.json",
            val_share=0.0,
            **options,
        ),
        workers=1,
        stream=io.StringIO(),
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(400, np.uint16), (65_499, np.uint16), (65_500, np.int32)])
def test_files_are_those_of_megatron(tmp_path: Path, vocab_size: int, dtype: Any) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab_size, size).tolist() for size in (3, 1, 900, 17)]
    build(tmp_path / "theirs", [[document] for document in documents], dtype=dtype)
    with (tmp_path / "ours.bin").open("wb") as data, (tmp_path / "ours.idx").open("wb") as index:
        writer = MegatronWriter(data, dtype=megatron_dtype(vocab_size))
        for document in documents:
            writer.add_document(np.array(document))
        writer.write_index(index)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_an_export(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(prepared), "--output", str(tmp_path / "megatron")]) == 0
    printed = capsys.readouterr().out
    for split in ("train", "val"):
        expected = reading.read_documents(prepared, split)
        dataset = IndexedDataset(str(tmp_path / "megatron" / split))
        assert len(dataset) == len(dataset.document_indices) - 1 == len(expected)
        assert all(np.array_equal(found, document) for found, document in zip(dataset, expected, strict=True))
        tokens = sum(document.size for document in expected)
        assert f"{split}.bin, .idx: {len(expected):,} documents, {tokens:,} tokens" in printed
    assert main(["export", str(prepared), "--output", str(tmp_path / "megatron")]) == 2
    assert f"{tmp_path}/megatron/train.bin: exists already" in capsys.readouterr().err
    before = (tmp_path / "megatron" / "train.idx").read_bytes()
    assert main(["export", str(prepared), "--output", str(tmp_path / "megatron"), "--overwrite"]) == 0
    assert (tmp_path / "megatron" / "train.idx").read_bytes() == before


def test_export_leaves_out_padding(prepared: Path, tmp_path: Path) -> None:
    options = PrepareOptions(
        output=tmp_path / "packed", max_megabytes=0.3, tokenizer=prepared / "tokenizer.json", pack_seq_length=64
    )
    result = prepare(options, workers=1, stream=io.StringIO())
    records = [record for shards in result.manifest.splits.values() for record in shards]
    exported = export_megatron(tmp_path / "packed", tmp_path / "megatron", stream=io.StringIO())
    assert result.padding > 0
    assert sum(part.tokens for part in exported) == sum(record.tokens for record in records) - result.padding
    assert sum(part.documents for part in exported) == sum(record.documents for record in records)


def test_export_names_a_damaged_chunk(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in reading.files_of(prepared).items():
        (copy / name).write_bytes(data)
    with (copy / "train-00000.tar").open("r+b") as file:
        file.seek(20_000)
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match=r"train-00000\.tar: chunk \d+ at byte \d+ was damaged"):
        export_megatron(copy, tmp_path / "megatron", stream=io.StringIO())
    assert list((tmp_path / "megatron").iterdir()) == [], "nothing half-written stays"


def test_round_trip(prepared: Path, tmp_path: Path) -> None:
    (train, _) = export_megatron(prepared, tmp_path / "megatron", stream=io.StringIO())
    result = import_tokens(tmp_path, prepared, Path(f"{train.prefix}.idx"))
    expected = sorted(document.tolist() for document in reading.read_documents(prepared, "train"))
    found = [document.tolist() for document in reading.read_documents(tmp_path / "imported", "train")]
    assert sorted(found) == expected
    assert found != [document.tolist() for document in reading.read_documents(prepared, "train")], "shuffled"
    assert result.manifest.tokenizer.encoder == "imported"
    assert result.manifest.dtype == "uint16"
    assert verify_dataset(tmp_path / "imported", workers=1, stream=io.StringIO()) == []


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_import_joins_sequences_and_cuts_at_eod(prepared: Path, tmp_path: Path, dtype: Any) -> None:
    documents = [[[5, 6], [7, 0]], [[8, 9, 0, 10], [11]], [[0]], [], [[12]], [[13, 0, 0, 14, 0, 0]]]
    index = build(tmp_path / "corpus", documents, dtype=dtype)
    result = import_tokens(tmp_path, prepared, index)
    found = sorted(document.tolist() for document in reading.read_documents(tmp_path / "imported", "train"))
    assert found == [[5, 6, 7, 0], [8, 9, 0], [10, 11, 0], [12, 0], [13, 0], [14, 0]]
    assert result.omissions.without_text == 2


def test_import_deduplicates_and_packs(prepared: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    long = random.integers(1, 400, 600)
    changed = long.copy()
    changed[300] = 1 + changed[300] % 399
    others = [random.integers(1, 400, size).tolist() for size in (50, 60, 70)]
    index = build(
        tmp_path / "corpus", [[document] for document in (long.tolist(), changed.tolist(), *others, others[0])]
    )
    result = import_tokens(tmp_path, prepared, index, dedup="near", pack_seq_length=64)
    assert result.manifest.dedup is not None
    assert (result.manifest.dedup.exact_removed, result.manifest.dedup.near_removed) == (1, 1)
    found = [
        [token for token in document.tolist() if token]
        for document in reading.read_documents(tmp_path / "imported", "train")
    ]
    assert sorted(found) == sorted([long.tolist(), *others])


def damage(tmp_path: Path, change: Any) -> str:
    index = build(tmp_path / "corpus", [[[1, 2, 3]], [[4, 5]]])
    change(index)
    with pytest.raises(DataError) as caught:
        MegatronReader(index)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.write_bytes(b"TNTIDX\0\0" * 9),
            r"not an index of Megatron's indexed dataset: it begins with b'TNT",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-3]),
            r"truncated or damaged: 79 bytes, 82 expected for 2 seq",
        ),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "a multimodal dataset"),
        (lambda path: path.with_suffix(".bin").write_bytes(b"\0" * 8), r"corpus\.bin: 8 bytes, corpus\.idx says 10"),
        (lambda path: path.with_suffix(".bin").unlink(), r"needs both corpus\.idx and corpus\.bin"),
        (lambda path: patch(path, 17, struct.pack("<B", 7)), "version 1 and dtype code 7; known: version 1, codes"),
        (lambda path: patch(path, 34, struct.pack("<i", 4)), "byte pointers do not follow from the lengths"),
        (lambda path: patch(path, 66, struct.pack("<q", 5)), "document indices do not run from 0 to 2 sequences"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Any, message: str) -> None:
    assert re.search(message, damage(tmp_path, change))


def patch(path: Path, offset: int, data: bytes) -> None:
    contents = bytearray(path.read_bytes())
    contents[offset : offset + len(data)] = data
    path.write_bytes(contents)


def test_other_mistakes(prepared: Path, tmp_path: Path) -> None:
    index = build(tmp_path / "corpus", [[[1, 2, 3]], [[4, 400]]])
    with pytest.raises(DataError, match=r"corpus\.bin: document 1: token id 400 is outside the vocabulary of 400"):
        import_tokens(tmp_path, prepared, index)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(DataError, match=r"sources mix tokens \(.*corpus\.idx\) and text \(.*text\.jsonl\)"):
        import_tokens(tmp_path, prepared, index, tmp_path / "text.jsonl")
    with pytest.raises(DataError, match=r"corpus\.idx: holds tokens; name the tokenizer .* --tokenizer"):
        prepare(PrepareOptions(output=tmp_path / "x", sources=(str(index),)), stream=io.StringIO())
