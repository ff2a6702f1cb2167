"""Text, JSON lines and Parquet: the formats of documents, read from an open stream.

What cannot be read stops the preparation and is named with file and line.  Nothing is guessed: a broken line, a field
of another type or a byte that is not UTF-8 is an error rather than a document less, because a corpus that is silently
short is not noticed for weeks.
"""

import io
import json
import tokenize
from collections.abc import Iterator
from typing import IO, Any

from pipeline.data.compression import read_problem
from pipeline.data.errors import DataError


def read_all(where: str, stream: IO[bytes]) -> bytes:
    """Everything in a stream; a DataError names `where` if it is damaged."""
    try:
        return stream.read()
    except Exception as error:
        if (problem := read_problem(error)) is None:
            raise
        raise DataError(f"{where}: {problem}") from None


def decode_text(where: str, data: bytes, *, suffixes: list[str]) -> str:
    """A text file as one document, with Unix line ends and without a byte-order mark.

    Args:
        where: Name of the file in errors.
        data: Its bytes.
        suffixes: Suffixes of its name; Python source may declare another encoding than UTF-8.

    Raises:
        DataError: The bytes are not valid in the encoding; names the line.
    """
    encoding = _python_encoding(where, data) if ".py" in suffixes[-2:] else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig")
        raise DataError(f"{where}:{line}: byte {error.start} is not valid {name}; convert the file to UTF-8") from None


def _python_encoding(where: str, data: bytes) -> str:
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError as error:
        raise DataError(f"{where}:1: unknown source encoding: {error}") from None


def read_json_lines(where: str, stream: IO[bytes], text_key: str) -> Iterator[str]:
    """The text of every line that is not blank."""
    number = 0
    while True:
        try:
            line = stream.readline()
        except Exception as error:
            if (problem := read_problem(error)) is None:
                raise
            raise DataError(f"{where}:{number + 1}: {problem}") from None
        if not line:
            return
        number += 1
        if line.strip():
            yield text_of_json(f"{where}:{number}", line, text_key)


def text_of_json(where: str, data: bytes, text_key: str) -> str:
    """The string under `text_key` of a JSON object; a DataError names `where` and what is there instead."""
    try:
        record = json.loads(data)
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


def read_parquet(where: str, stream: IO[bytes], text_key: str) -> Iterator[str]:
    """The text of every row; empty for a null."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{where}: reading .parquet needs the package pyarrow (pip install pyarrow)") from None
    # A parquet file is read from its end: a compressed one has to be in memory.
    seekable = (
        stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(read_all(where, stream))
    )
    row = 0
    try:
        with pq.ParquetFile(seekable, page_checksum_verification=True) as table:
            _check_column(where, table.schema_arrow, text_key)
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text_of_cell(f"{where}: row {row}", value, text_key)
    except (pa.ArrowException, OSError) as error:
        place = f"{where}: after row {row}" if row else where
        raise DataError(f"{place}: not a readable parquet file: {error}") from None


def _check_column(where: str, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        raise DataError(f"{where}: no column '{text_key}' (columns: {columns}); name it with --text-key")


def _text_of_cell(where: str, value: Any, text_key: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column '{text_key}' is {type(value).__name__}, expected a string")
    return value or ""
