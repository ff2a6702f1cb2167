"""The loader gives the windows that an independent reader finds, for any grouping, and refuses damaged data."""

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.loader import Prefetcher, WindowDataset
from pipeline.data.manifest import DatasetManifest
from pipeline.data.shards import ShardIndex, index_path
from tests.data import reading

Corpus = tuple[Path, DatasetManifest]
Damaged = Callable[[], Path]


@pytest.mark.parametrize(("split", "seq_length"), [("train", 64), ("train", 1000), ("val", 128)])
def test_an_epoch_is_every_window_once(corpus: Corpus, split: str, seq_length: int) -> None:
    folder, manifest = corpus
    dataset = WindowDataset(folder, split, seq_length=seq_length, seed=3)
    expected = [
        tokens[start : start + seq_length + 1].tobytes()
        for tokens, _ in reading.read_chunks(folder, split)
        for start in range(0, tokens.size - seq_length, seq_length)
    ]
    assert dataset.num_windows == len(expected)
    windows = dataset.windows(range(dataset.num_windows))
    assert windows.dtype == np.int64
    found = [window.astype(np.uint16).tobytes() for window in windows]
    assert found != expected
    assert sorted(found) == sorted(expected)
    second = dataset.windows(range(dataset.num_windows, 2 * dataset.num_windows))
    assert sorted(window.astype(np.uint16).tobytes() for window in second) == sorted(expected)
    assert not np.array_equal(windows, second)
    assert (dataset.vocab_size, dataset.eod_id) == (manifest.vocab_size, manifest.eod_id)
    dataset.close()


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (1, 24), (2, 3), (4, 2), (8, 3), (24, 1)])
def test_global_batch_does_not_depend_on_the_layout(corpus: Corpus, dp: int, micro_batch: int) -> None:
    """Each rank opens the dataset anew and reads its microbatches; together they are the same batch."""
    global_batch, step = 24, 17
    first = step * global_batch
    whole = WindowDataset(corpus[0], "train", seq_length=64, seed=3).windows(range(first, first + global_batch))
    parts = np.empty_like(whole)
    for rank in range(dp):
        dataset = WindowDataset(corpus[0], "train", seq_length=64, seed=3)
        for start in range(rank * micro_batch, global_batch, dp * micro_batch):
            parts[start : start + micro_batch] = dataset.windows(range(first + start, first + start + micro_batch))
    assert np.array_equal(parts, whole)


def test_resuming_elsewhere_in_the_stream(corpus: Corpus) -> None:
    stream = WindowDataset(corpus[0], "train", seq_length=64, seed=3).windows(range(3000))
    resumed = WindowDataset(corpus[0], "train", seq_length=64, seed=3)
    assert np.array_equal(resumed.windows(range(1234, 1300)), stream[1234:1300])


def test_fingerprint_changes_with_whatever_changes_the_stream(corpus: Corpus, damaged: Damaged) -> None:
    def fingerprint(folder: Path, split: str = "train", seq_length: int = 64, seed: int = 0) -> str:
        return WindowDataset(folder, split, seq_length=seq_length, seed=seed).fingerprint

    folder, copy = corpus[0], damaged()
    assert fingerprint(folder) == fingerprint(copy), "the place does not matter"
    raw = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**raw, "command": "x", "license": "y", "source": []}))
    assert fingerprint(folder) == fingerprint(copy), "how it was made does not matter"
    different = {
        fingerprint(folder),
        fingerprint(folder, "val"),
        fingerprint(folder, seq_length=65),
        fingerprint(folder, seed=1),
    }
    (copy / "dataset.json").write_text(json.dumps({**raw, "eod_id": 1}))
    assert len(different | {fingerprint(copy)}) == 5


def test_prefetcher_gives_the_same_batches(corpus: Corpus) -> None:
    dataset = WindowDataset(corpus[0], "train", seq_length=64, seed=3)
    batches = [range(i, i + 8) for i in range(0, 80, 8)]
    prefetcher = Prefetcher(dataset, batches)
    found = list(prefetcher)
    prefetcher.close()
    expected = WindowDataset(corpus[0], "train", seq_length=64, seed=3)
    assert len(found) == len(batches)
    assert all(np.array_equal(a, expected.windows(b)) for a, b in zip(found, batches, strict=True))


def test_prefetcher_stops_on_endless_streams_and_passes_errors_on(corpus: Corpus) -> None:
    dataset = WindowDataset(corpus[0], "train", seq_length=64, seed=3)
    prefetcher = Prefetcher(dataset, ([i] for i in itertools.count()), depth=3)
    assert np.array_equal(next(prefetcher), dataset.windows([0]))
    prefetcher.close()
    with pytest.raises(StopIteration):
        next(prefetcher)

    def numbers() -> Iterator[list[int]]:
        yield [1]
        raise RuntimeError("no more numbers")

    failing = Prefetcher(dataset, numbers())
    next(failing)
    with pytest.raises(RuntimeError, match="no more numbers"):
        next(failing)
    with pytest.raises(StopIteration):
        next(failing)
    failing.close()


def read_everything(folder: Path) -> None:
    dataset = WindowDataset(folder, "train", seq_length=64, seed=0)
    dataset.windows(range(dataset.num_windows))


def mistake(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_everything(folder)
    message = str(caught.value)
    assert re.search(rf"`qsparse data (verify {re.escape(str(folder))}|prepare)|run the .*prepare command", message)
    return message


def test_missing_shard_and_index(damaged: Damaged) -> None:
    folder = damaged()
    size = (folder / "train-00001.tar").stat().st_size
    (folder / "train-00001.tar").rename(folder / "away")
    assert f"train-00001.tar: missing shard, dataset.json lists it with {size} bytes" in mistake(folder)
    (folder / "away").rename(folder / "train-00001.tar")
    index = folder / "train-00001.tar.idx.npz"
    index.write_bytes(index.read_bytes()[:100])
    assert "train-00001.tar.idx.npz: damaged index" in mistake(folder)
    index.unlink()
    assert "train-00001.tar.idx.npz: missing index" in mistake(folder)


def test_truncated_shard(damaged: Damaged) -> None:
    folder = damaged()
    shard = folder / "train-00000.tar"
    size = shard.stat().st_size
    dataset = WindowDataset(folder, "train", seq_length=64, seed=0)
    with shard.open("r+b") as file:
        file.truncate(size // 2)
    assert f"train-00000.tar: truncated shard: {size // 2} bytes, dataset.json says {size}" in mistake(folder)
    with pytest.raises(
        DataError, match=r"train-00000\.tar: member 00000-\d+\.tokens\.npy at byte \d+: the file ends \d+"
    ):
        dataset.windows(range(dataset.num_windows))


def test_index_of_another_shard(damaged: Damaged) -> None:
    folder = damaged()
    (folder / "train-00001.tar.idx.npz").write_bytes((folder / "train-00000.tar.idx.npz").read_bytes())
    assert "train-00001.tar.idx.npz: index mismatch, it describes another shard than dataset.json" in mistake(folder)


def test_flipped_bit(damaged: Damaged) -> None:
    folder = damaged()
    shard = folder / "train-00001.tar"
    offset = int(ShardIndex.load(index_path(shard)).chunks["offset"][2])
    with shard.open("r+b") as file:
        file.seek(offset + 1001)
        byte = file.read(1)[0]
        file.seek(offset + 1001)
        file.write(bytes([byte ^ 1]))
    pattern = rf"train-00001\.tar: member 00001-00002\.tokens\.npy at byte {offset}: crc32 is \w+, the index says \w+"
    assert re.search(pattern, mistake(folder))


def test_token_outside_the_vocabulary(damaged: Damaged) -> None:
    """Shard, index and crc32 agree, yet an id is too large: as if tokenizer and tokens did not belong together."""
    folder = damaged()
    shard = folder / "train-00000.tar"
    index = ShardIndex.load(index_path(shard))
    chunk = index.chunks[1]
    with shard.open("r+b") as file:
        file.seek(int(chunk["offset"]) + 20)
        file.write((600).to_bytes(2, "little"))
        file.seek(int(chunk["offset"]))
        chunk["crc32"] = zlib.crc32(file.read(2 * int(chunk["tokens"])))
    index.save(index_path(shard))
    assert "member 00000-00001.tokens.npy at byte" in mistake(folder)
    assert "token id 600 is outside the vocabulary of 600" in mistake(folder)


def test_no_window_and_no_split(corpus: Corpus, damaged: Damaged) -> None:
    with pytest.raises(DataError, match=r"split 'train' has no window of 50001 tokens, its longest chunk holds \d+"):
        WindowDataset(corpus[0], "train", seq_length=50_000, seed=0)
    folder = damaged()
    raw = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**raw, "splits": {"train": raw["splits"]["train"]}}))
    with pytest.raises(DataError, match=r"no split 'val' \(there are: train\); prepare it with --val-share above 0"):
        WindowDataset(folder, "val", seq_length=64, seed=0)
    with pytest.raises(ValueError, match="sample numbers start at 0, got -1"):
        WindowDataset(corpus[0], "train", seq_length=64, seed=0).windows([-1])
