"""Where the bytes of shards come from: a folder, or a remote store behind a cache of chunks on the local disk.

Readers ask for parts of a chunk.  A folder gives them with one pread, and the page cache, which the processes of a
node share, does the rest.  A remote store gives whole chunks, one range request each: 2 to 4 MB is where object stores
are efficient, and the order reads a chunk from front to back anyway.
"""

import os
import threading
import weakref
from pathlib import Path
from typing import NamedTuple, Protocol

_MAX_OPEN_FILES = 256


class Extent(NamedTuple):
    """The tokens of one chunk as bytes of a shard."""

    shard: str
    """Name of the shard."""
    begin: int
    """Byte of the first token."""
    size: int
    """Bytes."""


class Store(Protocol):
    """Reads parts of chunks; all methods may be called by several threads."""

    attempts: int
    """How often to read a chunk whose checksum is wrong."""
    advice: str
    """What to do about a bad chunk, for messages."""

    def read(self, extent: Extent, start: int, size: int) -> bytes:
        """`size` bytes of a chunk from its byte `start` on; fewer if the file ends.

        Raises:
            OSError: it cannot be read.
        """

    def discard(self, extent: Extent) -> None:
        """Forget what is kept of a chunk: it was wrong."""

    def describe(self, shard: str) -> str:
        """Path or address of a shard, for messages."""

    def close(self) -> None:
        """Give back what is open; reading opens it again."""


class _OpenFile:
    """A file descriptor that is closed when the last thread that reads it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


class FolderStore:
    """Shards in a folder.

    Args:
        folder: dataset folder.
    """

    attempts = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.advice = f"see what else is wrong with `qsparse data verify {folder}`"
        self._files: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()

    def read(self, extent: Extent, start: int, size: int) -> bytes:
        """`size` bytes of a chunk from its byte `start` on; fewer if the file ends."""
        file = self._files.get(extent.shard) or self._open(extent.shard)
        return os.pread(file.descriptor, size, extent.begin + start)

    def discard(self, extent: Extent) -> None:
        """Nothing is kept."""

    def describe(self, shard: str) -> str:
        """Path of a shard."""
        return str(self._folder / shard)

    def close(self) -> None:
        """Close the shards."""
        with self._lock:
            self._files.clear()

    def _open(self, shard: str) -> _OpenFile:
        with self._lock:
            if shard not in self._files:
                if len(self._files) >= _MAX_OPEN_FILES:
                    self._files.pop(next(iter(self._files)))
                self._files[shard] = _OpenFile(self._folder / shard)
            return self._files[shard]
