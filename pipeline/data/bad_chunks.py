"""Chunks that are known to be bad, and what is read in their place.

A window of a bad chunk is replaced by one that is drawn by a hash of the window's own place, and of the attempt if that
chunk is bad, too.  So which window takes its place depends on the data alone, not on who reads it or when: a resume
under another layout gives the same batches.  The list is part of a checkpoint, because a chunk may be repaired, or fail
for a while only, and the run must go on as it began.
"""

import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.permute import derive_keys

_LIMIT_SHARE = 0.1
_LIMIT_CHUNKS = 8


class BadChunk(NamedTuple):
    """A chunk by names that hold wherever the dataset lies."""

    source: int
    """Number of the source in the mixture."""
    shard: str
    """Name of the shard."""
    chunk: int
    """Number of the chunk in the shard."""
    problem: str
    """What was found."""


class BadChunks:
    """The bad chunks that this process knows of; shared by threads."""

    def __init__(self, known: Iterable[BadChunk] = ()) -> None:
        self._chunks: dict[tuple[int, str, int], BadChunk] = {}
        self._new: list[BadChunk] = []
        self._lock = threading.Lock()
        self.merge(known)

    def __contains__(self, place: tuple[int, str, int]) -> bool:
        return place in self._chunks

    def __iter__(self) -> Iterator[BadChunk]:
        with self._lock:
            return iter(sorted(self._chunks.values()))

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, chunk: BadChunk) -> None:
        """Note a chunk that this process found."""
        with self._lock:
            if chunk[:3] not in self._chunks:
                self._chunks[chunk[:3]] = chunk
                self._new.append(chunk)

    def merge(self, chunks: Iterable[BadChunk]) -> bool:
        """Note what a checkpoint or another rank knows; True if something was new."""
        with self._lock:
            before = len(self._chunks)
            for chunk in chunks:
                self._chunks.setdefault(chunk[:3], chunk)
            return len(self._chunks) > before

    @property
    def has_new(self) -> bool:
        """Whether this process found chunks since `take_new`."""
        return bool(self._new)

    def take_new(self) -> list[BadChunk]:
        """What this process found since the last call."""
        with self._lock:
            new, self._new = self._new, []
            return new

    def check_share(self, num_chunks: int, last: str) -> None:
        """Give up when so much is bad that something else must be wrong, such as a store that is gone.

        Raises:
            DataError: more than a tenth of the chunks are bad.
        """
        if len(self) > max(_LIMIT_CHUNKS, _LIMIT_SHARE * num_chunks):
            raise DataError(
                f"{len(self)} of {num_chunks} chunks are bad, too many to go around (data.bad_shard=skip); "
                f"the last one: {last}"
            )


def substitute(
    windows_per_chunk: npt.NDArray[np.integer], place: tuple[int | str, ...], attempt: int
) -> tuple[int, int] | None:
    """Chunk and window to read in place of the one at `place`.

    Returns:
        None if the chunk that was drawn has no window: ask with the next attempt.
    """
    first, second = derive_keys((*place, "substitute", attempt), 2).tolist()
    chunk = first % len(windows_per_chunk)
    count = int(windows_per_chunk[chunk])
    return (chunk, second % count) if count else None
