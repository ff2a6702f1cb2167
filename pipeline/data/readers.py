"""Documents of one input file, whatever its format and compression."""

from collections.abc import Iterator

from pipeline.data.compression import MeteredFile, open_compressed, open_metered
from pipeline.data.sources import InputFile
from pipeline.data.tar_source import read_tar
from pipeline.data.text_formats import decode_text, read_all, read_json_lines, read_parquet


class DocumentReader:
    """Documents of one input, in order; empty ones included.

    Args:
        file: The input, anything but Megatron's indexed dataset.
        text_key: JSON field or parquet column with the text.
    """

    def __init__(self, file: InputFile, *, text_key: str = "text") -> None:
        self._file = file
        self._text_key = text_key
        self._meter: MeteredFile | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the file, as it lies on the disk, that were read so far."""
        return self._meter.bytes_read if self._meter is not None else 0

    def __iter__(self) -> Iterator[str]:
        """Yield the documents.

        Raises:
            DataError: The content cannot be read; names the file and the line, row or member.
            OSError: The file cannot be opened.
        """
        where = str(self._file.path)
        stream, self._meter = open_metered(self._file.path)
        with stream:
            data = open_compressed(stream, self._file.compression, where=where)
            if self._file.kind == "parquet":
                yield from read_parquet(where, data, self._text_key)
            elif self._file.kind == "tar":
                yield from read_tar(where, data, self._text_key)
            elif self._file.kind == "jsonl":
                yield from read_json_lines(where, data, self._text_key)
            else:
                yield decode_text(where, read_all(where, data), suffixes=self._file.path.suffixes)


def read_documents(file: InputFile, *, text_key: str = "text") -> Iterator[str]:
    """Documents of one input; see DocumentReader."""
    return iter(DocumentReader(file, text_key=text_key))
