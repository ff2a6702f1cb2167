"""Compressed files as streams of bytes, in which a file that ends early is an error and never a short read.

gzip, xz and bz2 come from the standard library, whose readers raise on a truncated stream.  zstandard's own reader
takes a truncated frame for the end of the file, so frames are decoded here one by one.
"""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, cast

from pipeline.data.errors import DataError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_BUFFER_BYTES = 1 << 20


class MeteredFile(io.FileIO):
    """A file that counts what was read from it, so that progress is known inside a compressed file too."""

    bytes_read = 0

    def readinto(self, buffer: Any) -> int | None:
        """Read into `buffer`; the number of bytes read."""
        count = super().readinto(buffer)
        self.bytes_read += count or 0
        return count

    def readall(self) -> bytes:
        """Everything up to the end of the file."""
        data = super().readall() or b""
        self.bytes_read += len(data)
        return data


def open_compressed(file: IO[bytes], compression: str, *, where: str) -> IO[bytes]:
    """Decompressed view of an open file.

    Args:
        file: The compressed bytes; closed by its owner.
        compression: One of COMPRESSIONS, or empty for a file that is not compressed.
        where: Name of the file in errors.

    Raises:
        DataError: The package that reads the compression is missing.
    """
    if compression == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".bz2":
        return bz2.BZ2File(file)
    if compression == ".zst":
        return _open_zstd(file, where)
    return file


def open_metered(path: Path) -> tuple[IO[bytes], MeteredFile]:
    """A buffered file and the meter below it."""
    raw = MeteredFile(str(path))
    return io.BufferedReader(raw, _BUFFER_BYTES), raw


def read_problem(error: Exception) -> str | None:
    """What is wrong with a file, if `error` is what reading or decompressing broken input raises."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, EOFError | lzma.LZMAError | zlib.error | OSError) or type(error).__name__ == "ZstdError":
        return f"damaged compressed file: {error}"
    return None


def _open_zstd(file: IO[bytes], where: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{where}: reading .zst needs the package zstandard (pip install zstandard)") from None
    return io.BufferedReader(_ZstdStream(file, zstandard.ZstdDecompressor()), _BUFFER_BYTES)


class _ZstdStream(io.RawIOBase):
    """Zstandard frames as one stream."""

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self._file = file
        self._new_frame = decompressor.decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if rest or self._frame is None or self._frame.eof:
                self._frame, data = None, rest or self._file.read(1 << 18)
            else:
                data = self._file.read(1 << 18)
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
