"""Random access to the tokens of one split, checked the first time a chunk is touched.

The first read of a chunk in this process reads it whole, compares its crc32 and checks that its ids lie in the
vocabulary; later reads are one pread of just the window.  There is no cache of tokens: the chunk is then in the page
cache, which processes of a node share.  Tar headers have checksums but payloads have none, so without this a flipped
bit would train silently.
"""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.checksum import crc32
from pipeline.data.errors import BadChunkError
from pipeline.data.index import load_split_index
from pipeline.data.manifest import DatasetManifest, Split
from pipeline.data.shards import DOCLENS_DTYPE, chunk_key, read_npy
from pipeline.data.stores import Extent, FolderStore, Store


class ChunkReader:
    """Reads tokens of a split's chunks, numbered over its shards in order; threads may share it.

    Args:
        folder: Dataset folder; of a remote dataset, the folder with copies of its small files.
        manifest: Its dataset.json.
        split: Which split.
        store: Where the shards are; absent: in `folder`.
        check_files: Compare the size of every shard with dataset.json.

    Raises:
        DataError: A shard or index is missing, has another size than dataset.json says, or does not belong to it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DatasetManifest,
        split: Split,
        *,
        store: Store | None = None,
        check_files: bool = True,
    ) -> None:
        self.index = load_split_index(folder, manifest, split, check_files=check_files and store is None)
        self._store = store or FolderStore(folder)
        self.dtype: np.dtype[Any] = manifest.token_dtype
        self._vocab_size = manifest.vocab_size
        self._extents: dict[int, Extent] = {}
        self._checked = bytearray(len(self.index.chunks))

    @property
    def tokens_per_chunk(self) -> npt.NDArray[np.int64]:
        """Tokens of every chunk."""
        tokens: npt.NDArray[np.int64] = self.index.chunks["tokens"]
        return tokens

    def read(self, chunk: int, start: int, count: int) -> bytes:
        """Tokens `[start, start + count)` of a chunk, as bytes of `dtype`.

        Raises:
            BadChunkError: The shard cannot be read, or the chunk is not what was written.
        """
        begin, size = start * self.dtype.itemsize, count * self.dtype.itemsize
        if self._checked[chunk]:
            return self._pread(chunk, begin, size)
        data = self._read_whole(chunk)
        self._checked[chunk] = 1
        return data[begin : begin + size]

    def document_lengths(self, chunk: int) -> npt.NDArray[np.int64]:
        """Tokens of the chunk's documents, or pieces of documents at its ends: the member before the tokens.

        Raises:
            BadChunkError: The shard cannot be read there.
        """
        tokens = self.extent(chunk)
        _, number = self.index.place(chunk)
        begin = _member_end(self.extent(chunk - 1)) if number else 0
        lengths = Extent(tokens.shard, begin, tokens.begin - begin)
        try:
            data = self._store.read(lengths, 0, lengths.size)
            member = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "ascii", "strict")
            array, _ = read_npy(data[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + member.size], DOCLENS_DTYPE)
            return array.astype(np.int64)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise self._error(chunk, f"the lengths of its documents cannot be read: {error}") from None

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._store.close()

    def extent(self, chunk: int) -> Extent:
        """Bytes of a chunk's tokens."""
        shard, _ = self.index.place(chunk)
        record = self.index.chunks[chunk]
        return Extent(
            self.index.records[shard].name, int(record["offset"]), int(record["tokens"]) * self.dtype.itemsize
        )

    def _known_extent(self, chunk: int) -> Extent:
        found = self._extents.get(chunk)
        if found is None:
            if len(self._extents) > 1 << 16:
                self._extents.clear()
            found = self._extents[chunk] = self.extent(chunk)
        return found

    def _read_whole(self, chunk: int) -> bytes:
        extent = self._known_extent(chunk)
        for attempt in range(self._store.attempts):
            data = self._pread(chunk, 0, extent.size)
            if (problem := self._problem(chunk, data)) is None:
                return data
            self._store.discard(extent)
            if attempt + 1 == self._store.attempts:
                raise self._error(chunk, problem)
        raise AssertionError("a store makes at least one attempt")

    def _pread(self, chunk: int, begin: int, size: int) -> bytes:
        try:
            data = self._store.read(self._known_extent(chunk), begin, size)
        except OSError as error:
            raise self._error(chunk, f"cannot be read: {error.strerror or error}") from None
        if len(data) != size:
            raise self._error(chunk, f"the file ends {size - len(data)} bytes early")
        return data

    def _problem(self, chunk: int, data: bytes) -> str | None:
        expected = int(self.index.chunks["crc32"][chunk])
        if (found := crc32(data)) != expected:
            return f"crc32 is {found:08x}, the index says {expected:08x}: the shard was damaged"
        tokens = np.frombuffer(data, dtype=self.dtype)
        if tokens.size and (largest := int(tokens.max())) >= self._vocab_size:
            return f"token id {largest} is outside the vocabulary of {self._vocab_size}"
        return None

    def _error(self, chunk: int, problem: str) -> BadChunkError:
        shard, number = self.index.place(chunk)
        extent = self._known_extent(chunk)
        member = f"{chunk_key(shard, number)}.tokens.npy"
        return BadChunkError(
            f"{self._store.describe(extent.shard)}: member {member} at byte {extent.begin}: {problem}; "
            f"{self._store.advice}"
        )


def _member_end(tokens: Extent) -> int:
    end = tokens.begin + tokens.size
    return end + -end % tarfile.BLOCKSIZE
