"""Where text comes from: files and folders turned into a sorted list of inputs, and inputs into documents.

    stdlib                        source of this Python's standard library, about 11 MB without its tests (PSF licence)
    FILE | FOLDER | 'GLOB'        .txt .md .rst .py     one document per file
                                  .jsonl .json          one document per line, the string under --text-key
                                  .parquet              one document per row, the column --text-key
    all but parquet also with .gz .xz .bz2 .zst behind

Files of a folder are ordered by a hash of their relative name, not by name: the order is the same everywhere, and a
`--max-megabytes` cap then takes an even sample of the tree rather than the letters a to c.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from pipeline.data.errors import DataError

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_SUPPORTED = f"{' '.join((*TEXT_SUFFIXES, *JSON_SUFFIXES))} .parquet (the first six also with {' '.join(COMPRESSIONS)})"
# Tests are partly not valid text on purpose and missing on Debian; encodings are character tables.
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class InputFile:
    """One file that holds documents."""

    path: Path
    kind: Literal["text", "jsonl", "parquet"]
    compression: str
    """Suffix of the compression, or empty."""
    bytes: int
    mtime_ns: int


def list_inputs(specs: Sequence[str]) -> list[InputFile]:
    """Files behind the sources, each once, in a fixed order.

    Args:
        specs: `stdlib`, files, folders or glob patterns.

    Raises:
        DataError: A source does not exist, holds nothing readable, or has an unknown suffix.
    """
    if not specs:
        raise DataError("no source given; use --source stdlib, a file, a folder or a quoted glob pattern")
    files = {file.path: file for spec in specs for file in _list_one(spec)}
    return list(files.values())


def _list_one(spec: str) -> list[InputFile]:
    if spec == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not _STDLIB_SKIPPED & set(path.relative_to(root).parts)]
        return [_describe(path) for path in _hash_order(root, paths)]
    path = Path(spec)
    if path.is_dir():
        found = [
            entry
            for entry in path.rglob("*")
            if _kind(entry) and entry.is_file() and not any(p.startswith(".") for p in entry.relative_to(path).parts)
        ]
        if not found:
            raise DataError(f"source {spec}: the folder holds no file with a suffix of {_SUPPORTED}")
        return [_describe(entry) for entry in _hash_order(path, found)]
    if path.is_file():
        return [_describe(path)]
    matches = [Path(match) for match in sorted(glob.glob(spec, recursive=True))]
    if not matches:
        raise DataError(f"source {spec}: no such file or folder, and as a glob pattern it matches nothing")
    return [_describe(match) for match in matches if match.is_file()]


def _hash_order(root: Path, paths: Sequence[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: hashlib.blake2b(path.relative_to(root).as_posix().encode()).digest())


def _kind(path: Path) -> tuple[Literal["text", "jsonl", "parquet"], str] | None:
    suffix, compression = path.suffix, ""
    if suffix in COMPRESSIONS:
        suffix, compression = Path(path.stem).suffix, suffix
    if suffix in TEXT_SUFFIXES:
        return "text", compression
    if suffix in JSON_SUFFIXES:
        return "jsonl", compression
    return ("parquet", "") if suffix == ".parquet" and not compression else None


def _describe(path: Path) -> InputFile:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"source {path}: unknown suffix; supported: {_SUPPORTED}")
    status = path.stat()
    return InputFile(path.resolve(), kind[0], kind[1], status.st_size, status.st_mtime_ns)


def read_documents(file: InputFile, *, text_key: str = "text") -> Iterator[str]:
    """Documents of one input, in order; empty ones included.

    Args:
        file: The input.
        text_key: JSON field or parquet column with the text.

    Raises:
        DataError: The content cannot be read; names the file and the line or row.
    """
    if file.kind == "parquet":
        yield from _read_parquet(file.path, text_key)
        return
    with _open(file) as stream:
        if file.kind == "jsonl":
            yield from _read_json_lines(file.path, stream, text_key)
        else:
            yield _read_text(file.path, stream)


def _open(file: InputFile) -> IO[bytes]:
    if file.compression == ".gz":
        return cast(IO[bytes], gzip.open(file.path))
    if file.compression == ".xz":
        return lzma.open(file.path)
    if file.compression == ".bz2":
        return bz2.open(file.path)
    if file.compression == ".zst":
        return _open_zstd(file.path)
    return file.path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs the package zstandard (pip install zstandard)") from None
    return io.BufferedReader(_ZstdStream(path, zstandard.ZstdDecompressor()), buffer_size=1 << 20)


class _ZstdStream(io.RawIOBase):
    """Zstandard frames as one stream.  zstandard's own reader takes a truncated frame for the end of the file."""

    def __init__(self, path: Path, decompressor: Any) -> None:
        self._file = path.open("rb")
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

    def close(self) -> None:
        self._file.close()
        super().close()


def _damage(error: Exception) -> bool:
    """Whether `error` is what a decompressor raises on broken input."""
    return isinstance(error, EOFError | lzma.LZMAError | zlib.error | OSError) or type(error).__name__ == "ZstdError"


def _read_text(path: Path, stream: IO[bytes]) -> str:
    try:
        data = stream.read()
    except Exception as error:
        if not _damage(error):
            raise
        raise DataError(f"{path}: damaged compressed file: {error}") from None
    encoding = _python_encoding(path, data) if _is_python(path) else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig")
        raise DataError(f"{path}:{line}: byte {error.start} is not valid {name}; convert the file to UTF-8") from None


def _is_python(path: Path) -> bool:
    return ".py" in path.suffixes[-2:]


def _python_encoding(path: Path, data: bytes) -> str:
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError as error:
        raise DataError(f"{path}:1: unknown source encoding: {error}") from None


def _read_json_lines(path: Path, stream: IO[bytes], text_key: str) -> Iterator[str]:
    number = 0
    while True:
        try:
            line = stream.readline()
        except Exception as error:
            if not _damage(error):
                raise
            raise DataError(f"{path}:{number + 1}: damaged compressed file: {error}") from None
        if not line:
            return
        number += 1
        if line.strip():
            yield _parse_json_line(f"{path}:{number}", line, text_key)


def _parse_json_line(where: str, line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: expected one JSON object per line: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if text_key not in record:
        fields = ", ".join(record) or "none"
        raise DataError(f"{where}: no field '{text_key}' (fields: {fields}); name the field with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{text_key}' is {type(text).__name__}, expected a string")
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs the package pyarrow (pip install pyarrow)") from None
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None
    with table:
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise DataError(f"{path}: no column '{text_key}' (columns: {', '.join(columns)}); name it with --text-key")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for value in batch.column(0).to_pylist():
                row += 1
                if value is not None and not isinstance(value, str):
                    kind = type(value).__name__
                    raise DataError(f"{path}: row {row}: column '{text_key}' is {kind}, expected a string")
                yield value or ""
