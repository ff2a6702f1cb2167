"""Removal of duplicate documents before the shuffle: of equal texts, and of texts that are nearly equal.

Equal: the same 64-bit BLAKE2b hash; of n different documents two collide with probability n^2 / 2^65 (6% for 1.5e9).
Nearly equal: two documents as sets A, B of 5-word shingles,

    J(A, B) = |A and B| / |A or B|      estimated by P = 128 MinHash values (Broder 1997; rensa): the share that agrees

Comparing all pairs is quadratic, so the P values are read as b bands of r, and only documents with one band in common
are compared: a pair of similarity s meets with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman, Mining of
Massive Datasets, section 3.4).  r is the largest that finds 98% of the pairs at the threshold.  Pairs that meet and
whose estimate reaches the threshold form clusters; the first document of a cluster, in the order of the sources, stays.
Obvious is an index of all signatures in a dictionary (datasketch's and rensa's LSH); here one band at a time is sorted:
16 bytes per document instead of several hundred, and the same result for any number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.parallel import Counts, Report
from pipeline.data.permute import mix64
from pipeline.data.shards import atomic_write
from pipeline.data.spool import read_documents_at

NUM_HASHES = 128
SHINGLE_WORDS = 5
_RECALL = 0.98
_SEED = 1
_READ_BATCH = 256
_WORD_CHARACTERS = 20
"""Above this mean length of a word, text is taken for a script without spaces."""

Signatures = npt.NDArray[np.uint32]


def exact_duplicates(documents: np.ndarray) -> npt.NDArray[np.bool_]:
    """Which documents repeat an earlier one; [documents] from a structured array with the field hash."""
    _, first = np.unique(documents["hash"], return_index=True)
    repeated = np.ones(len(documents), dtype=np.bool_)
    repeated[first] = False
    return repeated


@dataclass(frozen=True)
class SignatureTask:
    """Documents of one spool whose signatures are wanted."""

    folder: Path
    """Folder of the spools."""
    places: np.ndarray
    """[documents] places in the spool."""
    path: Path
    """File for [documents, NUM_HASHES] uint32; a finished one is kept."""
    are_tokens: bool


def write_signatures(task: SignatureTask, report: Report) -> Path:
    """Compute MinHash signatures of a spool's documents, or take the finished ones."""
    if task.path.exists():
        report(Counts(len(task.places), bytes=int(task.places["bytes"].sum())))
        return task.path
    signatures = np.empty((len(task.places), NUM_HASHES), dtype=np.uint32)
    for start in range(0, len(task.places), _READ_BATCH):
        batch = task.places[start : start + _READ_BATCH]
        for row, data in enumerate(read_documents_at(task.folder, batch), start):
            signatures[row] = minhash(shingles(data, are_tokens=task.are_tokens))
        report(Counts(len(batch), bytes=int(batch["bytes"].sum())))
    with atomic_write(task.path) as file:
        np.save(file, signatures)
    return task.path


def signature_name(number: int) -> str:
    """File name of a spool's signatures; another version of rensa's hashes has another name."""
    return f"minhash-{_rensa().RMinHash.ALGORITHM_VERSION}-{number:05d}.npy"


def shingles(data: bytes, *, are_tokens: bool = False) -> list[str]:
    """Overlapping runs of 5 words (of characters where words are not separated, of ids for tokens), case ignored."""
    if are_tokens:
        units = [str(token) for token in np.frombuffer(data, "<u4").tolist()]
    else:
        text = data.decode().lower()
        units = text.split()
        if len(text) > _WORD_CHARACTERS * len(units):
            units = list("".join(units))
    last = max(len(units) - SHINGLE_WORDS, 0)
    return [" ".join(units[i : i + SHINGLE_WORDS]) for i in range(last + 1)]


def minhash(items: Sequence[str]) -> list[int]:
    """MinHash signature of a set of strings, NUM_HASHES values below 2^32."""
    sketch = _rensa().RMinHash(num_perm=NUM_HASHES, seed=_SEED)
    sketch.update(items)
    values: list[int] = sketch.digest()
    return values


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands b, rows r): the largest r for which a pair at the threshold meets with probability 0.98."""
    rows = max(r for r in range(1, 17) if r == 1 or 1 - (1 - threshold**r) ** (NUM_HASHES // r) >= _RECALL)
    return NUM_HASHES // rows, rows


def near_duplicates(signatures: Sequence[Signatures], *, threshold: float) -> npt.NDArray[np.bool_]:
    """Which documents nearly repeat an earlier one.

    Args:
        signatures: [documents, NUM_HASHES] arrays, taken as one long list; may be memory-mapped.
        threshold: Estimated Jaccard similarity from which two documents count as the same.

    Returns:
        [all documents]
    """
    bands, rows = choose_bands(threshold)
    clusters = _Clusters(sum(len(part) for part in signatures))
    starts = np.cumsum([0, *(len(part) for part in signatures)])
    for band in range(bands):
        keys = np.concatenate([_band_keys(part[:, band * rows : (band + 1) * rows]) for part in signatures])
        for first, second in _meetings(keys):
            alike = _rows_at(signatures, starts, first) == _rows_at(signatures, starts, second)
            close = alike.mean(axis=1) >= threshold
            clusters.join(first[close], second[close])
    return clusters.followers()


def _band_keys(values: Signatures) -> npt.NDArray[np.uint64]:
    keys = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        keys = mix64(keys ^ column.astype(np.uint64))
    return keys


def _meetings(keys: npt.NDArray[np.uint64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs (first document with a key, later document with it), some thousand at a time."""
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=~keys[order][:1]))
    first = np.repeat(order[begins], np.diff(begins, append=len(order)))
    later = np.flatnonzero(first != order)
    for part in np.array_split(later, len(later) // 8192 + 1):
        yield first[part], order[part]


def _rows_at(
    signatures: Sequence[Signatures], starts: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]
) -> Signatures:
    rows = np.empty((len(documents), NUM_HASHES), dtype=np.uint32)
    part_of = np.searchsorted(starts, documents, side="right") - 1
    for part in np.unique(part_of).tolist():
        here = part_of == part
        rows[here] = signatures[part][documents[here] - starts[part]]
    return rows


class _Clusters:
    """Union-find in which the smallest number stands for its cluster."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size)

    def join(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._find(a), self._find(b)))
            self._parent[high] = low

    def followers(self) -> npt.NDArray[np.bool_]:
        result: npt.NDArray[np.bool_] = self._parent != np.arange(len(self._parent))
        return result

    def _find(self, number: int) -> int:
        while (parent := int(self._parent[number])) != number:
            self._parent[number] = number = int(self._parent[parent])
        return number


def _rensa():  # type: ignore[no-untyped-def]  # the package has no types
    try:
        import rensa
    except ImportError:
        raise DataError("--dedup near needs the package rensa (pip install rensa)") from None
    return rensa
