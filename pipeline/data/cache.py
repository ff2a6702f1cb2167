"""A folder of files with a bounded size; what was not used for longest goes first.

Processes share it without locks: a file appears by a rename, complete; it is refreshed by touching it; and whoever
finds the folder too large removes the oldest files.  A file may be gone by the time it is opened, so a reader must be
able to get it again.
"""

import os
import threading
from pathlib import Path

_KEEP = 0.9
"""Share of the limit that is left after cleaning up."""
_CHECKS_PER_LIMIT = 32


class FileCache:
    """Files by name under one folder.

    Args:
        folder: made if absent.
        limit_bytes: size of the folder; one file more may be there for a moment.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._added = limit_bytes  # look at the folder after the first file
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, start: int, size: int) -> bytes | None:
        """`size` bytes of a file from `start` on, or None if it is not there."""
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            os.utime(descriptor)
            return os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes) -> None:
        """Add or replace a file."""
        path = self._folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        with self._lock:
            self._added += len(data)
            is_due = self._added >= self._limit // _CHECKS_PER_LIMIT
            if is_due:
                self._added = 0
        if is_due:
            self._clean()

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        (self._folder / name).unlink(missing_ok=True)

    def _clean(self) -> None:
        files = []
        for entry in os.scandir(self._folder):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, status.st_size, entry.name))
        total = sum(size for _, size, _ in files)
        if total <= self._limit:
            return
        for _, size, name in sorted(files):
            if total <= self._limit * _KEEP:
                return
            self.remove(name)
            total -= size
