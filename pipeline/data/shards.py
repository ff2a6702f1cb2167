"""Shard files: plain WebDataset tars of token chunks, plus an index that makes them random access.

    NAME.tar, ustar, mtime 0, uid/gid 0              NAME.tar.idx.npz
      00000-00000.doclens.npy   uint32 [pieces]        chunks: offset, tokens, documents, crc32 per chunk
      00000-00000.tokens.npy    uint16|uint32 [n]      meta:   tar bytes, sha256, dtype, task (JSON)
      00000-00001.doclens.npy   ...

A member holds about 2^20 tokens of many documents, each ending in EOD: one member per document costs up to 13 bytes a
token in tar headers and padding, against 2.006 here.  A document longer than a chunk continues in the next one; then
the last entry of `doclens` has no EOD and does not count in `documents`.  `offset` is the byte of the first token, so
a window is one pread.  The tar is written by hand (header, data, padding) rather than through `webdataset.TarWriter`,
which imports torch, and because that gives exact offsets, a running sha256 and the same bytes on every machine.
"""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.checksum import crc32
from pipeline.data.errors import DataError

CHUNK_DTYPE = np.dtype([("offset", "<i8"), ("tokens", "<i8"), ("documents", "<u4"), ("crc32", "<u4")])
DOCLENS_DTYPE = np.dtype("<u4")
INDEX_SUFFIX = ".idx.npz"


def index_path(shard: Path) -> Path:
    """Path of a shard's index."""
    return shard.with_name(shard.name + INDEX_SUFFIX)


def chunk_key(shard_number: int, chunk: int) -> str:
    """WebDataset key of a chunk."""
    return f"{shard_number:05d}-{chunk:05d}"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary neighbour of `path`; flush it to disk and rename it when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard."""

    chunks: np.ndarray = field(repr=False, compare=False)
    """Structured array of CHUNK_DTYPE."""
    bytes: int
    sha256: str
    dtype: str
    task: str
    """Hash of the work that made this shard; a restart keeps the shard if it is unchanged."""

    @property
    def tokens(self) -> int:
        """Tokens in the shard."""
        return int(self.chunks["tokens"].sum())

    @property
    def documents(self) -> int:
        """Documents that end in the shard."""
        return int(self.chunks["documents"].sum())

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        meta = {"bytes": self.bytes, "sha256": self.sha256, "dtype": self.dtype, "task": self.task}
        with atomic_write(path) as file:
            np.savez(file, chunks=self.chunks, meta=np.array(json.dumps(meta, sort_keys=True)))

    @staticmethod
    def load(path: Path) -> "ShardIndex":
        """Read an index.

        Raises:
            DataError: It is missing or damaged.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                chunks, _ = read_npy(archive.read("chunks.npy"), CHUNK_DTYPE)
                text = archive.read("meta.npy")
                meta = json.loads(text[_npy_begin(text) :].decode("utf-32-le"))
        except FileNotFoundError:
            raise DataError(f"{path}: missing index; run the dataset's prepare command again to rebuild it") from None
        except Exception as error:
            raise DataError(f"{path}: damaged index ({error}); delete it and run the prepare command again") from None
        return ShardIndex(chunks=chunks, **meta)


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _npy_header(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    return buffer.getvalue()


def read_npy(data: bytes, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], int]:
    """The list in a .npy file, and the byte where it begins.

    NumPy evaluates headers as Python literals, which Python 3.11 may fail at when several threads do so at once
    (SystemError: AST constructor recursion depth mismatch).

    Raises:
        ValueError: It is no such file, or holds another dtype.
    """
    begin = _npy_begin(data)
    header, expected = data[10:begin].decode("latin1"), f"'descr': {np.lib.format.dtype_to_descr(dtype)!r}"
    if expected not in header:
        raise ValueError(f"its header is {header.strip()}, expected {expected}")
    return np.frombuffer(bytearray(data), dtype=dtype, offset=begin), begin


def _npy_begin(data: bytes) -> int:
    if data[:8] != np.lib.format.magic(1, 0):
        raise ValueError(f"it begins with {data[:8]!r}")
    return 10 + int.from_bytes(data[8:10], "little")


class ShardWriter:
    """Writes chunks to an open file and keeps their index.

    Args:
        file: Where the tar goes; only `write` is used.
        shard_number: First part of the members' keys.
        dtype: Dtype of the tokens.
    """

    def __init__(self, file: IO[bytes], *, shard_number: int, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._shard_number = shard_number
        self._dtype = dtype
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._chunks: list[tuple[int, int, int, int]] = []

    def add_chunk(self, tokens: npt.NDArray[Any], doclens: npt.NDArray[Any], *, documents: int) -> None:
        """Append one chunk.

        Args:
            tokens: [n] token ids.
            doclens: [pieces] lengths that sum to n.
            documents: Pieces that end in EOD: all of them, or all but the last.
        """
        assert int(doclens.sum()) == tokens.size
        key = chunk_key(self._shard_number, len(self._chunks))
        data = np.ascontiguousarray(tokens, dtype=self._dtype)
        self._add_array(f"{key}.doclens.npy", np.ascontiguousarray(doclens, dtype=DOCLENS_DTYPE))
        offset = self._add_array(f"{key}.tokens.npy", data)
        self._chunks.append((offset, tokens.size, documents, crc32(data.data)))

    def finish(self, *, task: str) -> ShardIndex:
        """Write the end of the archive and return the index."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        chunks = np.array(self._chunks, dtype=CHUNK_DTYPE)
        dtype = self._dtype.name
        return ShardIndex(chunks=chunks, bytes=self._position, sha256=self._sha256.hexdigest(), dtype=dtype, task=task)

    def _add_array(self, name: str, array: npt.NDArray[Any]) -> int:
        header = _npy_header(array)
        self._write(_tar_header(name, len(header) + array.nbytes))
        self._write(header)
        offset = self._position
        self._write(array.data.cast("B") if array.size else b"")
        self._write(bytes(-self._position % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)
