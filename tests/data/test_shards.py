"""Shards are plain tars that other tools read, and the same bytes every time."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.manifest import DatasetManifest, load_manifest
from pipeline.data.shards import ShardIndex, ShardWriter, atomic_write, index_path
from tests.data.reading import read_chunks

Corpus = tuple[Path, DatasetManifest]

READ_WITH_WEBDATASET = """
import hashlib, json, sys
import webdataset
found = []
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode():
    tokens, doclens = sample["tokens.npy"], sample["doclens.npy"]
    found.append([sample["__key__"], str(tokens.dtype), str(doclens.dtype), int(tokens.size), int(doclens.sum()),
                  hashlib.sha256(tokens.tobytes()).hexdigest()])
print(json.dumps(found))
"""


def test_stock_webdataset_reads_the_shards(corpus: Corpus) -> None:
    pytest.importorskip("webdataset")
    folder, manifest = corpus
    paths = [str(folder / record.name) for record in manifest.splits["train"]]
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_WEBDATASET, *paths], capture_output=True, text=True, check=True
    )
    samples = json.loads(done.stdout)
    chunks = read_chunks(folder, "train")
    assert len(samples) == len(chunks) == sum(record.chunks for record in manifest.splits["train"])
    for (_, dtype, lengths_dtype, size, total, digest), (tokens, _) in zip(samples, chunks, strict=True):
        assert (dtype, lengths_dtype, size, total) == ("uint16", "uint32", tokens.size, tokens.size)
        assert digest == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert samples[0][0] == "00000-00000"


def test_headers_are_plain_ustar(corpus: Corpus) -> None:
    folder, manifest = corpus
    path = folder / manifest.splits["train"][0].name
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode, member.pax_headers) == (0, 0, 0, 0o644, {})
    assert path.read_bytes()[257:263] == b"ustar\x00"
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_index_points_at_the_tokens(corpus: Corpus) -> None:
    folder, manifest = corpus
    for record in manifest.splits["train"]:
        data = (folder / record.name).read_bytes()
        index = ShardIndex.load(index_path(folder / record.name))
        with tarfile.open(folder / record.name) as tar:
            arrays = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith(".tokens.npy")]
        for chunk, tokens in zip(index.chunks, arrays, strict=True):
            assert chunk["offset"] % 64 == 0
            assert data[chunk["offset"] : chunk["offset"] + tokens.nbytes] == tokens.tobytes()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_writer_is_reproducible_and_takes_empty_shards(dtype: str) -> None:
    def write() -> tuple[bytes, ShardIndex]:
        file = io.BytesIO()
        writer = ShardWriter(file, shard_number=7, dtype=np.dtype(dtype))
        writer.add_chunk(np.arange(1000), np.array([400, 600]), documents=1)
        writer.add_chunk(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), documents=0)
        return file.getvalue(), writer.finish(task="t")

    first, second = write(), write()
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert first[1].tokens == 1000
    assert first[1].documents == 1


def test_index_survives_a_round_trip(tmp_path: Path) -> None:
    file = io.BytesIO()
    writer = ShardWriter(file, shard_number=0, dtype=np.dtype("<u2"))
    writer.add_chunk(np.arange(5), np.array([5]), documents=1)
    index = writer.finish(task="abc")
    index.save(tmp_path / "x.idx.npz")
    loaded = ShardIndex.load(tmp_path / "x.idx.npz")
    assert loaded == index
    assert np.array_equal(loaded.chunks, index.chunks)


def test_atomic_write_leaves_nothing_behind_on_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "f") as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_manifest_errors(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset\.json; make one with `qsparse data prepare --output"):
        load_manifest(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json: not valid JSON"):
        load_manifest(tmp_path)
    path.write_text('{"format_version": 9}')
    with pytest.raises(DataError, match="format_version is 9, this qsparse reads 1"):
        load_manifest(tmp_path)
    raw = json.loads(corpus[1].model_dump_json())
    path.write_text(json.dumps({**raw, "vocab_size": -1}))
    with pytest.raises(DataError, match="key vocab_size: Input should be greater than 0, got -1"):
        load_manifest(tmp_path)
    path.write_text(json.dumps({**raw, "vocab": 1}))
    with pytest.raises(DataError, match="key vocab: Extra inputs are not permitted"):
        load_manifest(tmp_path)


def test_nothing_imports_torch() -> None:
    code = (
        "import pkgutil, importlib, sys, pipeline.data as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module('pipeline.data.' + module.name)\n"
        "print(sorted(name for name in ('torch', 'megatron', 'webdataset') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
