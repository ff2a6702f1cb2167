"""Shards behind a real web server that drops, stalls and corrupts: the same tokens, or an error that says what."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.bad_chunks import BadChunks
from pipeline.data.cache import FileCache
from pipeline.data.errors import DataError
from pipeline.data.loader import OrderOptions, SourceFiles, WindowDataset, open_windows
from pipeline.data.manifest import DatasetManifest
from pipeline.data.phases import Phase
from pipeline.data.prefetch import Prefetcher
from pipeline.data.remote import RemoteFolder, RemoteOptions
from pipeline.data.shards import ShardIndex
from tests.data.store_server import Store, serve

Corpus = tuple[Path, DatasetManifest]


@pytest.fixture
def store(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr("pipeline.data.remote._FIRST_WAIT_SECONDS", 0.01)
    with serve(corpus[0]) as running:
        yield running


def options(tmp_path: Path, **changes: float) -> RemoteOptions:
    return RemoteOptions(**{"cache": tmp_path / "cache", "retries": 3, "timeout_seconds": 1.0, **changes})  # type: ignore[arg-type]


def remote_windows(store: Store, remote: RemoteOptions, bad: BadChunks | None = None) -> WindowDataset:
    phases, order = [Phase(0, 0, (1.0,), 64, 8)], OrderOptions(seed=3)
    return WindowDataset([SourceFiles(store.url, remote)], "train", phases=phases, order=order, bad_chunks=bad)


def local_windows(corpus: Corpus, count: int) -> np.ndarray:
    return open_windows(corpus[0], "train", seq_length=64, seed=3).windows(range(count))


def test_a_remote_dataset_gives_the_tokens_of_the_local_one(corpus: Corpus, store: Store, tmp_path: Path) -> None:
    remote, local = remote_windows(store, options(tmp_path)), open_windows(corpus[0], "train", seq_length=64, seed=3)
    assert np.array_equal(remote.windows(range(local.num_windows)), local_windows(corpus, local.num_windows))
    assert remote.fingerprint != local.fingerprint or remote.description == local.description
    chunks = sum(record.chunks for record in corpus[1].splits["train"])
    assert sum(count for name, count in store.requests.items() if name.endswith(".tar")) == chunks, "one each"
    store.requests.clear()
    again = remote_windows(store, options(tmp_path))
    assert np.array_equal(again.windows(range(3000)), local_windows(corpus, 3000))
    assert set(store.requests) == {"dataset.json"}, "the rest comes from the cache"


@pytest.mark.parametrize("fault", ["drop", "stall", "refuse", "corrupt", "short"])
def test_every_first_request_fails(corpus: Corpus, store: Store, tmp_path: Path, fault: str) -> None:
    shards = ("train-00001.tar",) if fault == "stall" else ("train-00000.tar", "train-00001.tar", "train-00002.tar")
    store.fault = lambda request: fault if request.name in shards and request.count == 1 else None
    store.stall_seconds = 1.5
    dataset = remote_windows(store, options(tmp_path, timeout_seconds=0.5 if fault == "stall" else 5.0))
    ahead = Prefetcher(dataset.windows, iter([range(i, i + 50) for i in range(0, 300, 50)]), threads=3, depth=4)
    assert np.array_equal(np.concatenate(list(ahead)), local_windows(corpus, 300))
    ahead.close()
    assert min(count for (name, _), count in store.ranges.items() if name in shards) > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuse", r"4 attempts failed, the last with .*503"),
        ("drop", "4 attempts failed, the last with ClientPayloadError"),
        ("stall", "4 attempts failed, the last with FSTimeoutError"),
        ("corrupt", r"crc32 is \w+, the index says \w+: the shard was damaged"),
        ("short", r"4 attempts failed, the last with .*the store sent \d+ bytes for bytes \d+ to \d+"),
        ("forbid", r"train-0000\d.tar: .*403"),
    ],
)
def test_a_store_that_does_not_recover(corpus: Corpus, store: Store, tmp_path: Path, fault: str, message: str) -> None:
    store.fault = lambda request: fault if request.name.endswith(".tar") else None
    store.stall_seconds = 0.3
    dataset = remote_windows(store, options(tmp_path, timeout_seconds=0.1 if fault == "stall" else 5.0))
    start = time.monotonic()
    with pytest.raises(
        DataError, match=rf"{store.url}/train-0000\d\.tar: member 0000\d-\d+\.tokens\.npy at byte \d+: "
    ) as caught:
        dataset.windows(range(5))
    assert caught.match(message)
    assert caught.match(f"see what else is wrong with `qsparse data verify {store.url}`")
    assert time.monotonic() - start < 10


def test_skip_goes_around_a_chunk_that_the_store_always_corrupts(corpus: Corpus, store: Store, tmp_path: Path) -> None:
    begins = ShardIndex.load(corpus[0] / "train-00001.tar.idx.npz").chunks["offset"][:3]
    store.fault = lambda request: "corrupt" if request[:2] in {("train-00001.tar", b) for b in begins} else None
    bad = BadChunks()
    found = remote_windows(store, options(tmp_path), bad).windows(range(2000))
    assert [chunk[:3] for chunk in bad] == [(0, "train-00001.tar", number) for number in range(3)]
    again = remote_windows(store, options(tmp_path), BadChunks(bad)).windows(range(1000, 2000))
    assert np.array_equal(again, found[1000:])
    replaced = (found != local_windows(corpus, 2000)).any(axis=1)
    assert 0.02 < replaced.mean() < 0.08


def test_what_is_not_there_is_said_at_once(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"remote dataset cannot be opened: {store.url}/nowhere/dataset.json: FileNotFound"
    ):
        SourceFiles(f"{store.url}/nowhere", options(tmp_path))
    assert store.requests["nowhere/dataset.json"] == 1
    with pytest.raises(DataError, match=r"nosuch://x: .*Protocol not known"):
        RemoteFolder("nosuch://x", options(tmp_path))


def test_a_dataset_that_was_replaced_is_copied_anew(corpus: Corpus, store: Store, tmp_path: Path) -> None:
    SourceFiles(store.url, options(tmp_path))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "versions").write_text("another")
    (folder / "train-00000.tar.idx.npz").write_bytes(b"of another")
    files = SourceFiles(store.url, options(tmp_path))
    assert (files.folder / "train-00000.tar.idx.npz").read_bytes() == (
        corpus[0] / "train-00000.tar.idx.npz"
    ).read_bytes()


def test_the_cache_stays_bounded_and_keeps_what_is_used(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    for number in range(40):
        cache.write(f"{number}", bytes([number]) * 100)
        os.utime(tmp_path / f"{number}", ns=(number * 10**9, number * 10**9))
        if number > 0:
            assert cache.read("0", 10, 5) == bytes(5), number
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1100
    assert cache.read("39", 0, 3) == bytes([39] * 3)
    assert cache.read("1", 0, 3) is None
    cache.remove("39")
    assert cache.read("39", 0, 3) is None


def test_a_cache_smaller_than_what_is_read(corpus: Corpus, store: Store, tmp_path: Path) -> None:
    remote = options(tmp_path, cache_bytes=100_000)
    assert np.array_equal(remote_windows(store, remote).windows(range(400)), local_windows(corpus, 400))
    (chunks,) = (tmp_path / "cache").glob("*/chunks")
    assert sum(path.stat().st_size for path in chunks.iterdir()) < 130_000
