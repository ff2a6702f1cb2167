"""The loader gives the windows that an independent reader finds, for any grouping, and refuses damaged data."""

import itertools
import json
import re
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.batches import samples_of_rank
from pipeline.data.bad_chunks import BadChunks
from pipeline.data.errors import DataError
from pipeline.data.loader import OrderOptions, SourceFiles, WindowDataset, open_windows
from pipeline.data.manifest import DatasetManifest
from pipeline.data.phases import Phase
from pipeline.data.prefetch import Prefetcher
from pipeline.data.shards import ShardIndex, index_path
from tests.data import reading

Corpus = tuple[Path, DatasetManifest]
Damaged = Callable[[], Path]


@pytest.mark.parametrize(("split", "seq_length"), [("train", 64), ("train", 1000), ("val", 128)])
def test_an_epoch_is_every_window_once(corpus: Corpus, split: str, seq_length: int) -> None:
    folder, manifest = corpus
    dataset = open_windows(folder, split, seq_length=seq_length, seed=3)
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


ORDERS = {
    "windows": OrderOptions(seed=3),
    "chunks": OrderOptions(seed=3, shuffle="chunks"),
}
GLOBAL_BATCH = 48


def mixture(folder: Path, order: str, bad: BadChunks | None = None, *, check_files: bool = True) -> WindowDataset:
    """The corpus mixed with itself 3 to 1, then 1 to 1, by steps of 48 windows of 64 tokens."""
    phases = [Phase(0, 0, (3.0, 1.0), 64, GLOBAL_BATCH), Phase(960, 61440, (1.0, 1.0), 64, GLOBAL_BATCH)]
    files = [SourceFiles(folder), SourceFiles(folder)]
    return WindowDataset(files, "train", phases=phases, order=ORDERS[order], bad_chunks=bad, check_files=check_files)


@cache
def global_batches(folder: Path, order: str) -> np.ndarray:
    """Steps 15 to 25 of one process, across the change of weights: [10, 48, 65]."""
    numbers = range(15 * GLOBAL_BATCH, 25 * GLOBAL_BATCH)
    return mixture(folder, order).windows(numbers).reshape(10, GLOBAL_BATCH, -1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", range(5))
@pytest.mark.parametrize(
    ("dp", "micro_batch"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 2), (4, 4), (8, 3), (8, 1), (16, 3), (48, 1)]
)
def test_global_batch_does_not_depend_on_the_layout(
    corpus: Corpus, dp: int, micro_batch: int, threads: int, order: str
) -> None:
    """Each rank reads its microbatches ahead with its own threads; together they are the same batches."""
    expected = global_batches(corpus[0], order)
    dataset = mixture(corpus[0], order)
    count = GLOBAL_BATCH // (dp * micro_batch)
    found = np.empty_like(expected)
    for rank in range(dp):
        steps = [samples_of_rank(step * GLOBAL_BATCH, count, micro_batch, rank, dp) for step in range(15, 25)]
        ahead = Prefetcher(dataset.windows, iter(steps), threads=threads, depth=4)
        for step, windows in enumerate(ahead):
            found[step, np.array(steps[step]) % GLOBAL_BATCH] = windows
        ahead.close()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 6000), st.integers(1, 64), st.integers(1, 8))
def test_resuming_anywhere_with_another_layout(corpus: Corpus, order: str, first: int, size: int, dp: int) -> None:
    stream = whole_stream(corpus[0], order)
    resumed = mixture(corpus[0], order)
    for rank in range(dp):
        mine = range(first + rank, min(first + dp * size, len(stream)), dp)
        assert np.array_equal(resumed.windows(mine), stream[first + rank : first + dp * size : dp])


@cache
def whole_stream(folder: Path, order: str) -> np.ndarray:
    return mixture(folder, order).windows(range(6600))


def test_threads_share_a_dataset(corpus: Corpus) -> None:
    """More shards are read at once than may be open."""
    dataset, numbers = mixture(corpus[0], "windows"), np.random.default_rng(0).permutation(6000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(dataset.windows, numbers.reshape(60, 100)))
    assert np.array_equal(np.concatenate(parts), whole_stream(corpus[0], "windows")[numbers])


def test_phases_with_other_lengths(corpus: Corpus) -> None:
    phases = [Phase(0, 0, (1.0,), 32, 8), Phase(80, 2560, (1.0,), 128, 8)]
    dataset = WindowDataset([SourceFiles(corpus[0])], "train", phases=phases, order=OrderOptions(seed=1))
    assert dataset.windows(range(72, 80)).shape == (8, 33)
    long = open_windows(corpus[0], "train", seq_length=128).num_windows
    windows = dataset.windows(range(80, 80 + long))
    assert len({window.tobytes() for window in windows}) == len({
        tokens[start : start + 129].astype(np.int64).tobytes()
        for tokens, _ in reading.read_chunks(corpus[0], "train")
        for start in range(0, tokens.size - 128, 128)
    })  # fmt: skip
    with pytest.raises(ValueError, match="samples 79 to 80 have different sequence lengths"):
        dataset.windows([79, 80])


def test_sources_of_different_tokenizers(corpus: Corpus, damaged: Damaged) -> None:
    copy = damaged()
    raw = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**raw, "tokenizer": {**raw["tokenizer"], "sha256": "0" * 64}}))
    with pytest.raises(DataError, match=r"was made with tokenizer .* and .*copy with .*prepare both with the same"):
        WindowDataset([SourceFiles(corpus[0]), SourceFiles(copy)], "train", phases=[Phase(0, 0, (1.0, 1.0), 64, 8)])


def test_a_packed_dataset_serves_its_own_length(corpus: Corpus, damaged: Damaged) -> None:
    copy = damaged()
    raw = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**raw, "packing": {"seq_length": 64}}))
    assert np.array_equal(
        open_windows(copy, "train", seq_length=128).windows(range(50)),
        open_windows(corpus[0], "train", seq_length=128).windows(range(50)),
    )
    with pytest.raises(DataError, match="packed for windows of 64 tokens, seq_length=96 would cut its documents"):
        open_windows(copy, "train", seq_length=96)


def test_fingerprint_changes_with_whatever_changes_the_stream(corpus: Corpus, damaged: Damaged) -> None:
    def fingerprint(folder: Path, split: str = "train", seq_length: int = 64, seed: int = 0) -> str:
        return open_windows(folder, split, seq_length=seq_length, seed=seed).fingerprint

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


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetcher_keeps_the_order_and_passes_errors_on(threads: int) -> None:
    def read(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        if number == 7:
            raise DataError("seven")
        return number * number

    ahead = Prefetcher(read, itertools.count(), threads=threads, depth=5)
    assert [next(ahead) for _ in range(7)] == [number * number for number in range(7)]
    with pytest.raises(DataError, match="seven"):
        next(ahead)
    assert next(ahead) == 64
    ahead.close()
    finite = Prefetcher(read, iter(range(3)), threads=threads, depth=5)
    assert list(finite) == [0, 1, 4]
    finite.close()


def test_prefetcher_reads_ahead_no_further_than_told() -> None:
    begun: list[int] = []
    ahead = Prefetcher(begun.append, itertools.count(), threads=2, depth=3)
    next(ahead)
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2, 3]
    ahead.close()


def read_everything(folder: Path) -> None:
    dataset = open_windows(folder, "train", seq_length=64, seed=0)
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
    dataset = open_windows(folder, "train", seq_length=64, seed=0)
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
        open_windows(corpus[0], "train", seq_length=50_000, seed=0)
    folder = damaged()
    raw = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**raw, "splits": {"train": raw["splits"]["train"]}}))
    with pytest.raises(DataError, match=r"no split 'val' \(there are: train\); prepare it with --val-share above 0"):
        open_windows(folder, "val", seq_length=64, seed=0)
    with pytest.raises(ValueError, match="sample numbers start at 0, got -1"):
        open_windows(corpus[0], "train", seq_length=64, seed=0).windows([-1])


def test_a_combined_index_takes_the_place_of_many(
    corpus: Corpus, damaged: Damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_windows(corpus[0], "train", seq_length=64).windows(range(100))
    folder = damaged()
    monkeypatch.setattr("pipeline.data.index.MIN_COMBINED_SHARDS", 2)
    SourceFiles(folder).combine_index("train", check_files=True)
    assert [path.suffix for path in (folder / ".index").iterdir()] == [".npy"]
    for index in folder.glob("train-*.idx.npz"):
        index.unlink()
    assert np.array_equal(open_windows(folder, "train", seq_length=64).windows(range(100)), expected)
    (folder / "train-00000.tar").unlink()
    with pytest.raises(DataError, match="missing shard"):
        SourceFiles(folder).combine_index("train", check_files=True)


def flip(folder: Path, shard: str, chunk: int) -> None:
    path = folder / shard
    offset = int(ShardIndex.load(index_path(path)).chunks["offset"][chunk])
    data = bytearray(path.read_bytes())
    data[offset + 1001] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("order", ORDERS)
def test_bad_chunks_are_gone_around_the_same_way_by_everyone(corpus: Corpus, damaged: Damaged, order: str) -> None:
    """A flipped bit and the loss of a shard's end: other windows take the place of theirs, and of no others."""
    folder, whole = damaged(), whole_stream(corpus[0], order)
    flip(folder, "train-00001.tar", 2)
    with (folder / "train-00000.tar").open("r+b") as file:
        file.truncate((folder / "train-00000.tar").stat().st_size - 25_000)
    bad = BadChunks()
    found = mixture(folder, order, bad, check_files=False).windows(range(6600))
    replaced = (found != whole).any(axis=1)
    assert {(chunk.shard, chunk.source) for chunk in bad} == {
        (shard, source) for shard in ("train-00000.tar", "train-00001.tar") for source in (0, 1)
    }
    assert all(
        re.search(r"member 0000\d-000\d\d\.tokens\.npy at byte \d+: (crc32 is|the file ends)", chunk.problem)
        for chunk in bad
    )
    windows = {
        tokens[start : start + 65].astype(np.int64).tobytes()
        for tokens, _ in reading.read_chunks(corpus[0], "train")
        for start in range(0, tokens.size - 64, 64)
    }
    assert 0.005 < replaced.mean() < 0.1
    assert all(window.tobytes() in windows for window in found)
    for rank in range(3):  # others, each knowing nothing, or what a checkpoint says
        for known in ((), bad):
            mine = range(1000 + rank, 2000, 3)
            dataset = mixture(folder, order, BadChunks(known), check_files=False)
            assert np.array_equal(dataset.windows(mine), found[list(mine)])
    repaired = mixture(corpus[0], order, BadChunks(bad))  # the shards are whole again, the run goes on as it began
    assert np.array_equal(repaired.windows(range(6600)), found)


def test_too_many_bad_chunks_are_not_gone_around(corpus: Corpus, damaged: Damaged) -> None:
    folder = damaged()
    for shard in folder.glob("train-*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"9 of \d+ chunks are bad, too many to go around .*No such file"):
        mixture(folder, "windows", BadChunks(), check_files=False).windows(range(100))
