"""Check a dataset against dataset.json, down to every token, shards in parallel.

Unlike the reader, which trusts the index and checks chunks as they are used, this walks the tars as a foreign tool
would and reports everything that is wrong rather than the first thing.  Behind an address it downloads one shard per
thread at a time: a check of what the store holds, not of what a cache of chunks has seen of it.
"""

import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TextIO

import numpy as np
import numpy.typing as npt

from pipeline.data.checksum import crc32
from pipeline.data.errors import DataError
from pipeline.data.index import open_index
from pipeline.data.manifest import MANIFEST_NAME, DatasetManifest, ShardRecord, load_manifest
from pipeline.data.parallel import Counts
from pipeline.data.progress import StageProgress
from pipeline.data.remote import RemoteFolder, RemoteOptions, is_remote
from pipeline.data.shards import DOCLENS_DTYPE, chunk_key, file_sha256, index_path, read_npy


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """Path or address."""
    message: str

    def __str__(self) -> str:
        """File and message on one line."""
        return f"{self.file}: {self.message}"


def verify_dataset(
    dataset: str | Path, *, workers: int = 4, remote: RemoteOptions | None = None, stream: TextIO = sys.stderr
) -> list[Problem]:
    """Check sizes, sha256, indexes, tar members, crc32, token range, document lengths and totals.

    Args:
        dataset: Folder or address.
        workers: Threads; hashing and downloading release the GIL.
        remote: How to read an address; shards pass through its cache folder, one per thread at a time.
        stream: Where progress is shown.

    Returns:
        Problems, by file; empty for a sound dataset.

    Raises:
        DataError: There is no readable dataset.json.
    """
    with _open_files(str(dataset), remote or RemoteOptions()) as files:
        manifest = files.manifest
        records = [record for shards in manifest.splits.values() for record in shards]
        problems = list(_check_tokenizer(files)) + list(_check_strangers(files, records))
        total = sum(record.bytes for record in records)
        with StageProgress("verify", total_bytes=total, stream=stream) as progress, ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(_check_shard, files, record): record for record in records}
            for future in as_completed(futures):
                record = futures[future]
                problems += future.result()
                progress.update(Counts(record.documents, record.tokens, record.bytes))
    return sorted(problems, key=str)


class _Files:
    """The files of a dataset folder.

    Args:
        place: Path or address, for messages.
        folder: Folder with dataset.json and the tokenizer.
    """

    def __init__(self, place: str, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.manifest: DatasetManifest = load_manifest(folder)

    @contextmanager
    def shard(self, record: ShardRecord) -> Iterator[Path]:
        """A folder that holds a shard and its index, if they exist."""
        yield self.folder

    def names(self) -> list[str]:
        """Names of all files."""
        return [path.name for path in self.folder.iterdir()]


class _RemoteFiles(_Files):
    """The files behind an address; shards are downloaded, and removed when they have been checked."""

    def __init__(self, remote: RemoteFolder, folder: Path) -> None:
        remote.download(MANIFEST_NAME, folder / MANIFEST_NAME)
        super().__init__(remote.address, folder)
        self._remote = remote
        with suppress(FileNotFoundError):
            remote.download(self.manifest.tokenizer.file, folder / self.manifest.tokenizer.file)

    @contextmanager
    def shard(self, record: ShardRecord) -> Iterator[Path]:
        paths = [self.folder / record.name, index_path(self.folder / record.name)]
        try:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._remote.download(path.name, path)
            yield self.folder
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        return self._remote.names()


@contextmanager
def _open_files(dataset: str, options: RemoteOptions) -> Iterator[_Files]:
    if not is_remote(dataset):
        yield _Files(dataset, Path(dataset))
        return
    cache = options.cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="verify-", dir=cache) as folder:
        try:
            files = _RemoteFiles(RemoteFolder(dataset, options), Path(folder))
        except OSError as error:
            raise DataError(f"remote dataset cannot be opened: {error}") from None
        yield files


def _check_tokenizer(files: _Files) -> Iterator[Problem]:
    tokenizer = files.manifest.tokenizer
    path, name = files.folder / tokenizer.file, f"{files.place}/{tokenizer.file}"
    if not path.is_file():
        yield Problem(name, "missing tokenizer")
    elif (found := file_sha256(path)) != tokenizer.sha256:
        yield Problem(name, f"sha256 is {found[:12]}.., dataset.json says {tokenizer.sha256[:12]}..")


def _check_strangers(files: _Files, records: list[ShardRecord]) -> Iterator[Problem]:
    known = {record.name for record in records}
    for name in sorted(files.names()):
        if name.endswith(".tar") and name not in known:
            yield Problem(f"{files.place}/{name}", "shard that dataset.json does not list")


def _check_shard(files: _Files, record: ShardRecord) -> list[Problem]:
    name = f"{files.place}/{record.name}"
    try:
        with files.shard(record) as folder:
            return [Problem(name, message) for message in _shard_problems(folder, record, files.manifest)]
    except OSError as error:
        return [Problem(name, f"cannot be read: {error}")]


def _shard_problems(folder: Path, record: ShardRecord, manifest: DatasetManifest) -> list[str]:
    path = folder / record.name
    problems: list[str] = []
    try:
        index = open_index(folder, record, manifest.dtype)
    except DataError as error:
        # The reader's message, without its advice to run this very check.
        return [str(error).split(": ", 1)[1].split("; check the dataset")[0]]
    if (found := file_sha256(path)) != record.sha256:
        problems.append(f"sha256 is {found[:12]}.., dataset.json says {record.sha256[:12]}..")
    number = int(record.name.split("-")[1].split(".")[0])

    def complain(member: str, offset: int, message: str) -> None:
        problems.append(f"member {member} at byte {offset}: {message}")

    try:
        with path.open("rb") as file, tarfile.open(fileobj=file) as tar:
            members = tar.getmembers()
            _check_names(members, number, len(index.chunks), complain)
            for chunk, pair in zip(index.chunks, zip(members[::2], members[1::2], strict=False), strict=False):
                _check_chunk(file, chunk, pair, manifest, complain)
    except tarfile.TarError as error:
        problems.append(f"not a readable tar: {error}")
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
        doclens, _ = read_npy(_member_data(file, pair[0]), DOCLENS_DTYPE)
        tokens, begin = read_npy(_member_data(file, pair[1]), manifest.token_dtype)
    except ValueError as error:
        complain(pair[1].name, pair[1].offset, f"not a readable .npy: {error}")
        return
    name, offset = pair[1].name, pair[1].offset_data + begin
    if offset != chunk["offset"] or tokens.size != chunk["tokens"]:
        complain(name, offset, f"{tokens.size} tokens, the index says {chunk['tokens']} at byte {chunk['offset']}")
        return
    if (found := crc32(tokens.data)) != chunk["crc32"]:
        complain(name, offset, f"crc32 is {found:08x}, the index says {int(chunk['crc32']):08x}")
    if tokens.max(initial=0) >= manifest.vocab_size:
        complain(name, offset, f"token id {tokens.max()} is outside the vocabulary of {manifest.vocab_size}")
    _check_documents(tokens, doclens, chunk, manifest.eod_id, lambda message: complain(pair[0].name, offset, message))


def _member_data(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


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
