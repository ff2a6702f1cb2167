"""Second pass of a preparation: the documents of one shard, tokenized and written.

A chunk is closed by the document that fills it, so it holds `chunk_tokens` to `2 chunk_tokens` tokens of whole
documents; only a document that would exceed that is cut, and goes on in the next chunk.  A shard's bytes depend on its
task alone, which is why any number of workers gives the same dataset and why a restart may keep finished shards.
Packed shards are cut by `packing.py` instead.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.manifest import Encoder, Split
from pipeline.data.packing import EncodedDocument, pack_documents
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
    encoder: Encoder | None
    """None: the spools hold token ids."""
    dtype: Literal["uint16", "uint32"]
    chunk_tokens: int
    spools: Path
    pack_seq_length: int | None = None


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
        packed = () if settings.pack_seq_length is None else ("packed", settings.pack_seq_length)
        layout = (settings.dtype, settings.chunk_tokens, self.number, *packed)
        parts = (settings.tokenizer_sha256, settings.eod_token, *layout)
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


class ShardEncoder:
    """Writes shards.  A worker process keeps one for all its tasks: loading a tokenizer takes a quarter of a second.

    Args:
        settings: What the shards have in common.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        settings = self._settings
        return TextTokenizer(settings.tokenizer, eod_token=settings.eod_token, encoder=settings.encoder or "tokenizers")

    def __call__(self, task: ShardTask, report: Report) -> ShardIndex:
        """Write a shard and its index.

        Args:
            task: The shard.
            report: Called after each chunk.

        Returns:
            The index.
        """
        dtype = np.dtype(self._settings.dtype)
        documents = _encoded_documents(task, self._tokenizer, dtype)
        with atomic_write(task.path) as file:
            writer = ShardWriter(file, shard_number=task.number, dtype=dtype)
            for chunk in _chunks(documents, self._settings, self._tokenizer.eod_id):
                writer.add_chunk(chunk.tokens, chunk.doclens, documents=chunk.documents)
                report(Counts(chunk.documents, chunk.tokens.size, chunk.text_bytes, padding=chunk.padding))
            index = writer.finish(task=task.fingerprint())
        index.save(index_path(task.path))
        return index


class _Chunk(NamedTuple):
    tokens: npt.NDArray[Any]
    doclens: npt.NDArray[np.int64]
    documents: int
    text_bytes: int
    padding: int = 0


def _chunks(documents: Iterator[EncodedDocument], settings: EncodeSettings, eod_id: int) -> Iterator[_Chunk]:
    if settings.pack_seq_length is None:
        yield from _consecutive_chunks(documents, settings.chunk_tokens)
        return
    for chunk in pack_documents(
        documents, seq_length=settings.pack_seq_length, chunk_tokens=settings.chunk_tokens, eod_id=eod_id
    ):
        yield _Chunk(chunk.tokens, chunk.doclens, len(chunk.doclens), chunk.text_bytes, chunk.padding)


def _consecutive_chunks(documents: Iterator[EncodedDocument], limit: int) -> Iterator[_Chunk]:
    pieces: list[npt.NDArray[Any]] = []
    size = text_bytes = 0
    for tokens, num_bytes in documents:
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


def _encoded_documents(task: ShardTask, tokenizer: TextTokenizer, dtype: np.dtype[Any]) -> Iterator[EncodedDocument]:
    are_tokens = task.settings.encoder is None
    for start in range(0, len(task.documents), _READ_BATCH):
        places = task.documents[start : start + _READ_BATCH]
        for data in read_documents_at(task.settings.spools, places):
            ids = np.frombuffer(data, "<u4") if are_tokens else tokenizer.encode_array(data.decode())
            yield np.append(ids, tokenizer.eod_id).astype(dtype), len(data)
