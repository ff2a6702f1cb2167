"""Where the chunks of a split lie: the indexes of its shards, one after the other.

Every shard has its own index, so that shards can be made and remade one by one.  But 8,192 ranks that open 28,000 of
them each are a quarter of a billion opens at the start of a job.  So rank 0 checks the shards once and writes

    DIR/.index/train-IDENTITY.npy      the chunks of all shards, 24 bytes each

which every rank maps: one open, and one copy in the memory of a node.  The name holds the dataset's identity, so an
index of other shards is never taken.  Small datasets and folders that cannot be written go without.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.manifest import DatasetManifest, ShardRecord, Split
from pipeline.data.shards import CHUNK_DTYPE, ShardIndex, atomic_write, index_path

MIN_COMBINED_SHARDS = 32
"""Datasets with fewer shards are opened shard by shard."""
_FOLDER = ".index"
_THREADS = 8


@dataclass(frozen=True)
class SplitIndex:
    """The chunks of a split, counted over its shards in order."""

    records: tuple[ShardRecord, ...]
    chunks: np.ndarray
    """[chunks] of CHUNK_DTYPE."""
    first_chunk: npt.NDArray[np.int64]
    """[shards + 1] number of each shard's first chunk."""

    def place(self, chunk: int) -> tuple[int, int]:
        """Shard of a chunk, and the chunk's number inside it."""
        shard = int(np.searchsorted(self.first_chunk, chunk, side="right")) - 1
        return shard, chunk - int(self.first_chunk[shard])

    def windows(self, seq_length: int) -> npt.NDArray[np.int32]:
        """Windows of `seq_length + 1` tokens, overlapping by one, in each chunk."""
        return (np.maximum(self.chunks["tokens"] - 1, 0) // seq_length).astype(np.int32)


def load_split_index(folder: Path, manifest: DatasetManifest, split: Split, *, check_files: bool = True) -> SplitIndex:
    """The index of a split: the combined one where there is one, else shard by shard.

    Args:
        folder: dataset folder.
        manifest: its dataset.json.
        split: which split.
        check_files: compare the size of every shard with dataset.json.

    Raises:
        DataError: a shard or index is missing, has another size than dataset.json says, or does not belong to it.
    """
    records = manifest.shards_of(split, folder)
    first_chunk = np.array([0, *accumulate(record.chunks for record in records)])
    combined = _combined_path(folder, manifest, split)
    if combined.is_file():
        chunks = np.load(combined, mmap_mode="r", allow_pickle=False)
    else:
        chunks = _read_all(folder, manifest, records, check_files=check_files)
    return SplitIndex(records, chunks, first_chunk)


def combine_index(folder: Path, manifest: DatasetManifest, split: Split, *, check_files: bool = True) -> None:
    """Check the shards of a large split and write its combined index; for one process, before the others open it.

    Raises:
        DataError: as for `load_split_index`.
    """
    records = manifest.shards_of(split, folder)
    if len(records) < MIN_COMBINED_SHARDS:
        return
    chunks = _read_all(folder, manifest, records, check_files=check_files)
    path = _combined_path(folder, manifest, split)
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            np.save(file, chunks)
    except OSError:
        return  # a read-only dataset: the ranks read the indexes of the shards


def _combined_path(folder: Path, manifest: DatasetManifest, split: Split) -> Path:
    return folder / _FOLDER / f"{split}-{manifest.identity()[:32]}.npy"


def _read_all(
    folder: Path, manifest: DatasetManifest, records: tuple[ShardRecord, ...], *, check_files: bool
) -> np.ndarray:
    with ThreadPoolExecutor(_THREADS) as pool:
        load = lambda record: open_index(folder, record, manifest.dtype, check_file=check_files).chunks  # noqa: E731
        parts = list(pool.map(load, records))
    return np.concatenate(parts).astype(CHUNK_DTYPE, copy=False)


def open_index(folder: Path, record: ShardRecord, dtype: str, *, check_file: bool = True) -> ShardIndex:
    """Index of a shard, after checking that shard, index and dataset.json belong together.

    Raises:
        DataError: They do not, or one is missing.
    """
    path = folder / record.name
    hint = f"check the dataset with `qsparse data verify {folder}`"
    if check_file:
        _check_size(path, record, hint)
    index = ShardIndex.load(index_path(path))
    expected = (record.bytes, record.sha256, dtype, record.tokens, record.documents, record.chunks)
    if (index.bytes, index.sha256, index.dtype, index.tokens, index.documents, len(index.chunks)) != expected:
        raise DataError(f"{index_path(path)}: index mismatch, it describes another shard than dataset.json; {hint}")
    return index


def _check_size(path: Path, record: ShardRecord, hint: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing shard, dataset.json lists it with {record.bytes} bytes; {hint}")
    if (size := path.stat().st_size) != record.bytes:
        kind = "truncated shard" if size < record.bytes else "shard of another dataset"
        raise DataError(f"{path}: {kind}: {size} bytes, dataset.json says {record.bytes}; {hint}")
