"""Second pass of a preparation: the documents of one shard, tokenized and written.

A chunk is closed by the document that fills it, so it holds `chunk_tokens` to `2 chunk_tokens` tokens of whole
documents; only a document that would exceed that is cut, and goes on in the next chunk.  A shard's bytes depend on its
task alone, which is why any number of workers gives the same dataset and why a restart may keep finished shards.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.manifest import Encoder, Split
from pipeline.data.parallel import Counts, Report
from pipeline.data.shards import ShardIndex, ShardWriter, atomic_write, index_path
from pipeline.data.spool import read_documents_at
from pipeline.data.tokenizer import TextTokenizer

_READ_BATCH = 256


@dataclass(frozen=True)
class EncodeSettings:
    """What all shards of a preparation have in common."""

    tokenizer: Path
    tokenizer_sha256: str
    eod_token: str
    encoder: Encoder
    dtype: str
    chunk_tokens: int
    spools: Path


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    settings: EncodeSettings
    path: Path
    split: Split
    number: int
    documents: np.ndarray = field(repr=False)
    """[documents] PLACE_DTYPE, in the order of the shard."""

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes to tokenize."""
        return int(self.documents["bytes"].sum())

    def fingerprint(self) -> str:
        """Hash of what decides the shard's bytes: documents, tokenizer, layout.  The encoder library does not."""
        settings = self.settings
        parts = (settings.tokenizer_sha256, settings.eod_token, settings.dtype, settings.chunk_tokens, self.number)
        digest = hashlib.sha256(repr(parts).encode())
        digest.update(np.ascontiguousarray(self.documents["hash"]).tobytes())
        return digest.hexdigest()


def finished_index(task: ShardTask) -> ShardIndex | None:
    """Index of the shard if an earlier run finished exactly this task."""
    try:
        index = ShardIndex.load(index_path(task.path))
    except DataError:
        return None
    intact = task.path.is_file() and task.path.stat().st_size == index.bytes
    return index if intact and index.task == task.fingerprint() else None


def encode_shard(task: ShardTask, report: Report) -> ShardIndex:
    """Write the shard and its index.

    Args:
        task: The shard.
        report: Called after each chunk.

    Returns:
        The index.
    """
    settings = task.settings
    tokenizer = TextTokenizer(settings.tokenizer, eod_token=settings.eod_token, encoder=settings.encoder)
    dtype = np.dtype(settings.dtype)
    with atomic_write(task.path) as file:
        writer = ShardWriter(file, shard_number=task.number, dtype=dtype)
        for chunk in _chunks(task, tokenizer, dtype):
            writer.add_chunk(chunk.tokens, chunk.doclens, documents=chunk.documents)
            report(Counts(chunk.documents, chunk.tokens.size, chunk.text_bytes))
        index = writer.finish(task=task.fingerprint())
    index.save(index_path(task.path))
    return index


class _Chunk(NamedTuple):
    tokens: npt.NDArray[Any]
    doclens: npt.NDArray[np.int64]
    documents: int
    text_bytes: int


def _chunks(task: ShardTask, tokenizer: TextTokenizer, dtype: np.dtype[Any]) -> Iterator[_Chunk]:
    limit = task.settings.chunk_tokens
    pieces: list[npt.NDArray[Any]] = []
    size = text_bytes = 0
    for tokens, num_bytes in _encoded_documents(task, tokenizer, dtype):
        pieces.append(tokens)
        size += tokens.size
        text_bytes += num_bytes
        while size >= 2 * limit:
            last = pieces.pop()
            kept = limit - (size - last.size)
            head = [*pieces, last[:kept]]
            yield _Chunk(np.concatenate(head), _lengths(head), len(pieces), 0)
            pieces, size = [last[kept:]], size - limit
        if size >= limit:
            yield _Chunk(np.concatenate(pieces), _lengths(pieces), len(pieces), text_bytes)
            pieces, size, text_bytes = [], 0, 0
    if pieces:
        yield _Chunk(np.concatenate(pieces), _lengths(pieces), len(pieces), text_bytes)


def _lengths(pieces: list[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.array([piece.size for piece in pieces], dtype=np.int64)


def _encoded_documents(
    task: ShardTask, tokenizer: TextTokenizer, dtype: np.dtype[Any]
) -> Iterator[tuple[npt.NDArray[Any], int]]:
    for start in range(0, len(task.documents), _READ_BATCH):
        places = task.documents[start : start + _READ_BATCH]
        texts = read_documents_at(task.settings.spools, places)
        for text, num_bytes in zip(texts, places["bytes"].tolist(), strict=True):
            ids = tokenizer.encode_array(text)
            yield np.append(ids, tokenizer.eod_id).astype(dtype), num_bytes
