"""Megatron's indexed dataset, read and written byte for byte (megatron-core's `IndexedDataset`, without torch).

    PREFIX.bin   token ids of all sequences, one after the other
    PREFIX.idx   "MMIDIDX", two zero bytes, version <u8 = 1, dtype code <u1, sequences S <u8, documents + 1 <u8
                 lengths <i4 [S] in tokens, pointers <i8 [S] in bytes, documents <i8 [documents + 1] in sequences

Document d is the sequences `documents[d]` to `documents[d + 1]`.  Writing makes one sequence per document, as
Megatron's `preprocess_data.py --append-eod` does.  Reading cuts after every EOD: here an EOD ends a document, wherever
it stands.
"""

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MAX_UINT16_VOCAB = 65_500
"""Megatron's own limit (`DType.optimal_dtype`)."""


def megatron_dtype(vocab_size: int) -> np.dtype[Any]:
    """Dtype that Megatron picks for a vocabulary."""
    return np.dtype("<u2") if vocab_size < _MAX_UINT16_VOCAB else np.dtype("<i4")


class MegatronReader:
    """Documents of PREFIX.idx and PREFIX.bin.

    Args:
        path: PREFIX.idx.

    Raises:
        DataError: The files are missing, damaged, do not belong together, or do not hold text tokens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bin = path.with_suffix(".bin")
        if not path.is_file() or not self._bin.is_file():
            raise DataError(f"{path}: an indexed dataset needs both {path.name} and {self._bin.name}")
        data = path.read_bytes()
        if len(data) < _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
            raise DataError(f"{path}: not an index of Megatron's indexed dataset: it begins with {data[:9]!r}")
        _, version, code, sequences, indices = _HEADER.unpack_from(data)
        if version != 1 or code not in _DTYPES:
            raise DataError(f"{path}: version {version} and dtype code {code}; known: version 1, codes {list(_DTYPES)}")
        self._dtype = np.dtype(_DTYPES[code])
        expected = _HEADER.size + 12 * sequences + 8 * indices
        if len(data) != expected:
            kind = "a multimodal dataset" if len(data) == expected + sequences else "truncated or damaged"
            raise DataError(f"{path}: {kind}: {len(data)} bytes, {expected} expected for {sequences} sequences")
        lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size)
        pointers = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
        documents = np.frombuffer(data, "<i8", indices, _HEADER.size + 12 * sequences)
        ends = np.cumsum(lengths, dtype=np.int64)
        if (lengths < 0).any() or not np.array_equal(pointers, (ends - lengths) * self._dtype.itemsize):
            raise DataError(f"{path}: damaged: byte pointers do not follow from the lengths")
        if indices < 1 or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
            raise DataError(f"{path}: damaged: document indices do not run from 0 to {sequences} sequences")
        self.edges: npt.NDArray[np.int64] = np.concatenate(([0], ends))[documents]
        """[documents + 1] first token of each document, and the number of tokens."""
        size = int(self.edges[-1]) * self._dtype.itemsize
        if self._bin.stat().st_size != size:
            raise DataError(f"{self._bin}: {self._bin.stat().st_size} bytes, {path.name} says {size}")

    def documents(self, *, eod_id: int, vocab_size: int) -> Iterator[npt.NDArray[np.uint32]]:
        """Token ids of every document, without EOD; cut after every EOD, runs of EOD left out.

        Args:
            eod_id: Token that ends documents.
            vocab_size: Ids must be below.

        Raises:
            DataError: An id is outside the vocabulary; names the document.
        """
        with self._bin.open("rb") as file:
            for number, count in enumerate(np.diff(self.edges).tolist()):
                data = file.read(count * self._dtype.itemsize)
                ids = np.frombuffer(data, self._dtype)
                if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                    wrong = ids.min() if ids.min() < 0 else ids.max()
                    raise DataError(
                        f"{self._bin}: document {number}: token id {wrong} is outside the vocabulary of {vocab_size}; "
                        "pass the --tokenizer that made these tokens"
                    )
                yield from split_at_eod(ids.astype(np.uint32), eod_id)


def split_at_eod(ids: npt.NDArray[Any], eod_id: int) -> list[npt.NDArray[Any]]:
    """Cut after every EOD and drop it; empty parts are left out, but something is always returned.

    >>> [part.tolist() for part in split_at_eod(np.array([5, 6, 0, 7, 0, 0]), 0)]
    [[5, 6], [7]]
    """
    parts = [part[:-1] for part in np.split(np.append(ids, eod_id), np.flatnonzero(ids == eod_id) + 1)]
    return [part for part in parts if part.size] or [ids[:0]]


class MegatronWriter:
    """Writes documents to an open PREFIX.bin and keeps what PREFIX.idx needs: 4 bytes per document.

    Args:
        file: Where the token ids go.
        dtype: Their dtype; see `megatron_dtype`.
    """

    def __init__(self, file: IO[bytes], *, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._dtype = dtype
        self._lengths = array("i")

    def add_document(self, ids: npt.NDArray[Any]) -> None:
        """Append one document, EOD included."""
        self._file.write(np.ascontiguousarray(ids, self._dtype).data)
        self._lengths.append(ids.size)

    def write_index(self, file: IO[bytes]) -> None:
        """Write PREFIX.idx."""
        lengths = np.frombuffer(self._lengths, "<i4")
        count = len(lengths)
        code = next(code for code, name in _DTYPES.items() if np.dtype(name) == self._dtype)
        file.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
        file.write(lengths.tobytes())
        file.write(((np.cumsum(lengths, dtype=np.int64) - lengths) * self._dtype.itemsize).tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
