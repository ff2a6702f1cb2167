"""Which document goes where: split, shuffle and shards, as arrays and before anything is tokenized.

Split: a document is validation when the hash of its text is below `val_share * 2^64`, so copies of a document never
stand on both sides, and a document keeps its side when the corpus grows or the seed changes.  Shuffle: documents are
sorted by a mixed hash of their number and the seed.  Shards: the shuffled list is cut where the bytes of text say;
token counts are only known later, so shards have about, not exactly, the same number of tokens.
Both are independent of the number of workers.  The cost is about 90 bytes of memory per document at the peak.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.errors import DataError
from pipeline.data.manifest import Split
from pipeline.data.permute import derive_keys, mix64

PLACE_DTYPE = np.dtype([("spool", "<i4"), ("offset", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])
MAX_CHUNK_TOKENS = 2**20
MIN_CHUNK_TOKENS = 2**14
MAX_SHARD_TOKENS = 2**28
MIN_SHARD_TOKENS = 2**19
_CHUNKS_WANTED = 64
_SHARDS_WANTED = 16


def gather_documents(spools: Sequence[np.ndarray], *, limit_bytes: int | None) -> np.ndarray:
    """Documents of all spools, up to and including the one that reaches `limit_bytes`, as PLACE_DTYPE.

    Raises:
        DataError: There is no document.
    """
    documents = np.empty(sum(map(len, spools)), dtype=PLACE_DTYPE)
    start = 0
    for number, spool in enumerate(spools):
        part = documents[start : start + len(spool)]
        part["spool"] = number
        for name in ("offset", "bytes", "hash"):
            part[name] = spool[name]
        start += len(spool)
    if not len(documents):
        raise DataError("the sources hold no document with text")
    if limit_bytes is None:
        return documents
    before = np.cumsum(documents["bytes"]) - documents["bytes"]
    kept: np.ndarray = documents[before < limit_bytes]
    return kept


def split_and_shuffle(documents: np.ndarray, *, val_share: float, seed: int) -> dict[Split, np.ndarray]:
    """Shuffled documents of each split; a split without documents is absent.

    With `val_share` above 0 and two documents or more, neither split is empty.
    """
    is_val = documents["hash"].astype(np.float64) < val_share * 2.0**64
    if val_share > 0 and documents["hash"].min() < documents["hash"].max():
        is_val |= documents["hash"] == documents["hash"].min()
        is_val &= documents["hash"] != documents["hash"].max()
    number = np.arange(len(documents), dtype=np.uint64)
    order = np.argsort(mix64(number ^ derive_keys((seed, "documents"), 1)[0]), kind="stable")
    del number
    is_val = is_val[order]
    halves: dict[Split, np.ndarray] = {"train": order[~is_val], "val": order[is_val]}
    return {split: documents[part] for split, part in halves.items() if len(part)}


def choose_chunk_tokens(train_tokens: float) -> int:
    """Power of two that gives at least 64 chunks, between 2^14 and 2^20."""
    wanted = max(1, int(train_tokens / _CHUNKS_WANTED))
    return min(max(1 << (wanted.bit_length() - 1), MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)


def choose_shard_tokens(train_tokens: float) -> int:
    """About 16 shards for small corpora, so that workers have something to share; at most 2^28 tokens (512 MiB)."""
    return min(max(int(train_tokens / _SHARDS_WANTED), MIN_SHARD_TOKENS), MAX_SHARD_TOKENS)


def cut_shards(documents: np.ndarray, *, shard_bytes: float) -> list[np.ndarray]:
    """Cut shuffled documents into consecutive shards of about `shard_bytes` of text, none empty."""
    total = int(documents["bytes"].sum())
    num_shards = max(1, round(total / shard_bytes))
    before = np.cumsum(documents["bytes"]) - documents["bytes"]
    shard = (before / total * num_shards).astype(np.int64)
    return np.split(documents, np.flatnonzero(np.diff(shard)) + 1)
