"""Documents of a WebDataset tar of raw text.

    000017.txt  000017.json          one sample: the text is 000017.txt, the JSON beside it is taken for metadata
    000018.json                      one sample: the text is the field --text-key
    part-3.jsonl.gz                  one document per line
    000017.cls  000017.jpg           left alone

Consecutive members with the same name up to the first dot are one sample, as in WebDataset; text is .txt .md .rst .py,
and every member may be compressed on its own.  `tarfile` takes a damaged header, or a file that stops between two
members, for the end of the archive; here only the block of zeros that ends a tar ends it.
"""

import tarfile
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, NamedTuple

from pipeline.data.compression import COMPRESSIONS, open_compressed, read_problem
from pipeline.data.errors import DataError
from pipeline.data.sources import TEXT_SUFFIXES
from pipeline.data.text_formats import decode_text, read_all, read_json_lines, text_of_json

_SUFFIXES = (*TEXT_SUFFIXES, ".json", ".jsonl")


class _StrictTarInfo(tarfile.TarInfo):
    """Header of a member; anything that is not one, nor the end of the archive, is an error."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in typeshed
            raise
        except tarfile.HeaderError as error:
            reason = "the file ends without an end-of-archive block" if str(error) == "empty header" else error
            raise DataError(f"damaged or truncated tar at byte {tarfile_.offset}: {reason}") from None


class _Sample(NamedTuple):
    key: str
    text: str | None = None
    json: tuple[str, bytes] | None = None
    """Member and contents, parsed only if there is no text."""


def read_tar(where: str, stream: IO[bytes], text_key: str) -> Iterator[str]:
    """Documents of a tar, in order.

    Args:
        where: Name of the file in errors.
        stream: The tar, decompressed; read from front to back.
        text_key: JSON field with the text.

    Raises:
        DataError: The tar is damaged or truncated, a member cannot be read, or no member holds text.
    """
    try:
        yield from _read_members(where, stream, text_key)
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(where) else f"{where}: {text}") from None
    except Exception as error:
        if isinstance(error, tarfile.TarError):
            raise DataError(f"{where}: damaged or truncated tar: {error}") from None
        if (problem := read_problem(error)) is None:
            raise
        raise DataError(f"{where}: {problem}") from None


def _read_members(where: str, stream: IO[bytes], text_key: str) -> Iterator[str]:
    sample = _Sample("")
    others: set[str] = set()
    found = False
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo) as tar:
        for member in tar:
            suffix, compression = _suffix(member.name)
            if not member.isfile() or suffix not in _SUFFIXES or PurePath(member.name).name.startswith("."):
                others.add(suffix or member.name)
                continue
            found = True
            place = f"{where}: member {member.name}"
            file = tar.extractfile(member)
            assert file is not None
            data = open_compressed(file, compression, where=place)
            key = _key(member.name)
            if key != sample.key or suffix == ".jsonl":
                yield from _text_of(sample, text_key)
                sample = _Sample(key)
            if suffix == ".jsonl":
                yield from read_json_lines(place, data, text_key)
            elif suffix == ".json":
                sample = sample._replace(json=(place, read_all(place, data)))
            else:
                yield from _text_of(sample._replace(json=None), text_key)
                sample = sample._replace(text=decode_text(place, read_all(place, data), suffixes=[suffix]))
    yield from _text_of(sample, text_key)
    if others and not found:
        raise DataError(f"{where}: no member is {' '.join(_SUFFIXES)}; it holds {' '.join(sorted(others))}")


def _text_of(sample: _Sample, text_key: str) -> Iterator[str]:
    if sample.text is not None:
        yield sample.text
    elif sample.json is not None:
        yield text_of_json(*sample.json, text_key)


def _suffix(name: str) -> tuple[str, str]:
    suffixes = PurePath(name).suffixes or [""]
    if suffixes[-1] in COMPRESSIONS:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return suffixes[-1], ""


def _key(name: str) -> str:
    path = PurePath(name)
    return str(path.with_name(path.name.split(".")[0]))
