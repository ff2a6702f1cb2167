"""Random access to the tokens of one split, checked the first time a chunk is touched.

Opening compares every shard's size and index with dataset.json.  The first read of a chunk in this process reads it
whole, compares its crc32 and the range of its ids; later reads are one pread of just the window.  There is no cache:
the chunk is then in the page cache, which processes of a node share.  Tar headers have checksums but payloads have
none, so without this a flipped bit would train silently.
"""

import os
import zlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.manifest import DatasetManifest, ShardRecord, Split
from pipeline.data.shards import ShardIndex, chunk_key, index_path

_MAX_OPEN_FILES = 256


class ChunkReader:
    """Reads tokens of a split's chunks, numbered over its shards in order.  Not for use by two threads at once.

    Args:
        folder: Dataset folder.
        manifest: Its dataset.json.
        split: Which split.

    Raises:
        DataError: A shard or index is missing, has another size than dataset.json says, or does not belong to it.
    """

    def __init__(self, folder: Path, manifest: DatasetManifest, split: Split) -> None:
        self._folder = folder
        self._records = manifest.shards_of(split, folder)
        self._dtype = manifest.token_dtype
        self._vocab_size = manifest.vocab_size
        indexes = [open_index(folder, record, manifest.dtype) for record in self._records]
        chunks = np.concatenate([index.chunks for index in indexes])
        self.tokens_per_chunk: npt.NDArray[np.int64] = chunks["tokens"].copy()
        self._offsets: list[int] = chunks["offset"].tolist()
        self._crc32: list[int] = chunks["crc32"].tolist()
        self._first_chunk = [0, *accumulate(len(index.chunks) for index in indexes)]
        self._checked = bytearray(len(chunks))
        self._files: dict[int, int] = {}

    def read(self, chunk: int, start: int, count: int) -> npt.NDArray[Any]:
        """Tokens `[start, start + count)` of a chunk, in the stored dtype.

        Raises:
            DataError: The shard cannot be read, or the chunk is not what was written.
        """
        if not self._checked[chunk]:
            tokens = self._pread(chunk, 0, int(self.tokens_per_chunk[chunk]))
            self._check(chunk, tokens)
            self._checked[chunk] = 1
            return tokens[start : start + count]
        return self._pread(chunk, start, count)

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _shard_of(self, chunk: int) -> int:
        return bisect_right(self._first_chunk, chunk) - 1

    def _pread(self, chunk: int, start: int, count: int) -> npt.NDArray[Any]:
        size = count * self._dtype.itemsize
        data = os.pread(self._file(chunk), size, self._offsets[chunk] + start * self._dtype.itemsize)
        if len(data) != size:
            self._fail(chunk, f"the file ends {size - len(data)} bytes early")
        return np.frombuffer(data, dtype=self._dtype)

    def _file(self, chunk: int) -> int:
        shard = self._shard_of(chunk)
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(self._folder / self._records[shard].name, os.O_RDONLY)
            except OSError as error:
                self._fail(chunk, f"cannot be opened: {error.strerror}")
        return self._files[shard]

    def _check(self, chunk: int, tokens: npt.NDArray[Any]) -> None:
        found = zlib.crc32(tokens.data)
        if found != self._crc32[chunk]:
            self._fail(chunk, f"crc32 is {found:08x}, the index says {self._crc32[chunk]:08x}: the shard was damaged")
        if tokens.size and (largest := int(tokens.max())) >= self._vocab_size:
            self._fail(chunk, f"token id {largest} is outside the vocabulary of {self._vocab_size}")

    def _fail(self, chunk: int, problem: str) -> NoReturn:
        shard = self._shard_of(chunk)
        path = self._folder / self._records[shard].name
        member = f"{chunk_key(shard, chunk - self._first_chunk[shard])}.tokens.npy"
        raise DataError(
            f"{path}: member {member} at byte {self._offsets[chunk]}: {problem}; "
            f"see what else is wrong with `qsparse data verify {self._folder}`"
        )


def open_index(folder: Path, record: ShardRecord, dtype: str) -> ShardIndex:
    """Index of a shard, after checking that shard, index and dataset.json belong together.

    Raises:
        DataError: They do not, or one is missing.
    """
    path = folder / record.name
    hint = f"check the dataset with `qsparse data verify {folder}`"
    if not path.is_file():
        raise DataError(f"{path}: missing shard, dataset.json lists it with {record.bytes} bytes; {hint}")
    if (size := path.stat().st_size) != record.bytes:
        kind = "truncated shard" if size < record.bytes else "shard of another dataset"
        raise DataError(f"{path}: {kind}: {size} bytes, dataset.json says {record.bytes}; {hint}")
    index = ShardIndex.load(index_path(path))
    expected = (record.bytes, record.sha256, dtype, record.tokens, record.documents, record.chunks)
    if (index.bytes, index.sha256, index.dtype, index.tokens, index.documents, len(index.chunks)) != expected:
        raise DataError(f"{index_path(path)}: index mismatch, it describes another shard than dataset.json; {hint}")
    return index
