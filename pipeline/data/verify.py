"""Check a dataset against dataset.json, down to every token, shards in parallel.

Unlike the reader, which trusts the index and checks chunks as they are used, this walks the tars as a foreign tool
would and reports everything that is wrong rather than the first thing.
"""

import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.index import open_index
from pipeline.data.manifest import DatasetManifest, ShardRecord, load_manifest
from pipeline.data.parallel import Counts
from pipeline.data.progress import StageProgress
from pipeline.data.shards import chunk_key, file_sha256


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: Path
    message: str

    def __str__(self) -> str:
        """File and message on one line."""
        return f"{self.file}: {self.message}"


def verify_dataset(folder: Path, *, workers: int = 4, stream: TextIO = sys.stderr) -> list[Problem]:
    """Check sizes, sha256, indexes, tar members, crc32, token range, document lengths and totals.

    Args:
        folder: Dataset folder.
        workers: Threads; hashing releases the GIL.
        stream: Where progress is shown.

    Returns:
        Problems, by file; empty for a sound dataset.

    Raises:
        DataError: There is no readable dataset.json.
    """
    manifest = load_manifest(folder)
    records = [record for shards in manifest.splits.values() for record in shards]
    problems = list(_check_tokenizer(folder, manifest)) + list(_check_strangers(folder, records))
    total = sum(record.bytes for record in records)
    with StageProgress("verify", total_bytes=total, stream=stream) as progress, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_check_shard, folder, record, manifest): record for record in records}
        for future in as_completed(futures):
            record = futures[future]
            problems += future.result()
            progress.update(Counts(record.documents, record.tokens, record.bytes))
    return sorted(problems, key=str)


def _check_tokenizer(folder: Path, manifest: DatasetManifest) -> Iterator[Problem]:
    path = folder / manifest.tokenizer.file
    if not path.is_file():
        yield Problem(path, "missing tokenizer")
    elif (found := file_sha256(path)) != manifest.tokenizer.sha256:
        yield Problem(path, f"sha256 is {found[:12]}.., dataset.json says {manifest.tokenizer.sha256[:12]}..")


def _check_strangers(folder: Path, records: list[ShardRecord]) -> Iterator[Problem]:
    known = {record.name for record in records}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield Problem(path, "shard that dataset.json does not list")


def _check_shard(folder: Path, record: ShardRecord, manifest: DatasetManifest) -> list[Problem]:
    path = folder / record.name
    problems: list[Problem] = []
    try:
        index = open_index(folder, record, manifest.dtype)
    except DataError as error:
        # The reader's message, without its advice to run this very check.
        return [Problem(path, str(error).split(": ", 1)[1].split("; check the dataset")[0])]
    if (found := file_sha256(path)) != record.sha256:
        problems.append(Problem(path, f"sha256 is {found[:12]}.., dataset.json says {record.sha256[:12]}.."))
    number = int(record.name.split("-")[1].split(".")[0])

    def complain(member: str, offset: int, message: str) -> None:
        problems.append(Problem(path, f"member {member} at byte {offset}: {message}"))

    try:
        with path.open("rb") as file, tarfile.open(fileobj=file) as tar:
            members = tar.getmembers()
            _check_names(members, number, len(index.chunks), complain)
            for chunk, pair in zip(index.chunks, zip(members[::2], members[1::2], strict=False), strict=False):
                _check_chunk(file, chunk, pair, manifest, complain)
    except (tarfile.TarError, OSError) as error:
        problems.append(Problem(path, f"not a readable tar: {error}"))
    return problems


Complain = Callable[[str, int, str], None]


def _check_names(members: list[tarfile.TarInfo], number: int, num_chunks: int, complain: Complain) -> None:
    keys = [chunk_key(number, chunk) for chunk in range(num_chunks)]
    expected = [f"{key}.{part}.npy" for key in keys for part in ("doclens", "tokens")]
    for member, name in zip(members, expected, strict=False):
        if member.name != name:
            complain(member.name, member.offset, f"expected {name} here")
    if len(members) != len(expected):
        complain("(end)", 0, f"{len(members)} members, the index says {len(expected)}")


def _check_chunk(
    file: IO[bytes],
    chunk: np.void,
    pair: tuple[tarfile.TarInfo, tarfile.TarInfo],
    manifest: DatasetManifest,
    complain: Complain,
) -> None:
    try:
        doclens, _ = _read_npy(file, pair[0])
        tokens, offset = _read_npy(file, pair[1])
    except ValueError as error:
        complain(pair[1].name, pair[1].offset, f"not a readable .npy: {error}")
        return
    name = pair[1].name
    if offset != chunk["offset"] or tokens.size != chunk["tokens"]:
        complain(name, offset, f"{tokens.size} tokens, the index says {chunk['tokens']} at byte {chunk['offset']}")
        return
    if (found := zlib.crc32(tokens.data)) != chunk["crc32"]:
        complain(name, offset, f"crc32 is {found:08x}, the index says {int(chunk['crc32']):08x}")
    if tokens.max(initial=0) >= manifest.vocab_size:
        complain(name, offset, f"token id {tokens.max()} is outside the vocabulary of {manifest.vocab_size}")
    _check_documents(tokens, doclens, chunk, manifest.eod_id, lambda message: complain(pair[0].name, offset, message))


def _read_npy(file: IO[bytes], member: tarfile.TarInfo) -> tuple[npt.NDArray[Any], int]:
    file.seek(member.offset_data)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    offset = file.tell()
    data = file.read(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype=dtype), offset


def _check_documents(
    tokens: npt.NDArray[Any],
    doclens: npt.NDArray[Any],
    chunk: np.void,
    eod_id: int,
    complain: Callable[[str], None],
) -> None:
    if int(doclens.sum()) != tokens.size:
        complain(f"lengths sum to {int(doclens.sum())}, the chunk has {tokens.size} tokens")
        return
    ends = np.cumsum(doclens.astype(np.int64)) - 1
    closed = int((tokens[ends] == eod_id).sum())
    if closed != chunk["documents"] or len(doclens) - closed > 1:
        complain(f"{closed} of {len(doclens)} documents end in EOD, the index says {chunk['documents']}")
