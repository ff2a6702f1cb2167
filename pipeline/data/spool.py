"""First pass of a preparation: every document into spool files that allow random access.

    .prepare/spool-00000.bin   the documents' bytes, one after the other: UTF-8, or <u4 ids of imported tokens
    .prepare/spool-00000.npz   [documents] offset, bytes, content hash; and what was left out

Sources may be compressed or huge, so documents cannot be shuffled where they are; the spool costs the corpus's text
once on disk until the preparation is done.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from pipeline.data.megatron_format import MegatronReader
from pipeline.data.parallel import Counts, Report
from pipeline.data.readers import DocumentReader
from pipeline.data.shards import atomic_write
from pipeline.data.sources import InputFile

SPOOL_DTYPE = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])
_TASK_BYTES = 16 * 2**20
_REPORT_BYTES = 2**20


class TokenRange(NamedTuple):
    """What imported tokens may be."""

    eod_id: int
    vocab_size: int


@dataclass(frozen=True)
class Omissions:
    """What reading left out or changed."""

    without_text: int = 0
    """Documents that are empty or white space."""
    empty_files: int = 0
    """Files without any document, not even an empty one."""
    repaired: int = 0
    """Documents in which lone surrogates, which no UTF-8 text has, became U+FFFD."""

    def __add__(self, other: "Omissions") -> "Omissions":
        """Sums."""
        return Omissions(
            self.without_text + other.without_text,
            self.empty_files + other.empty_files,
            self.repaired + other.repaired,
        )

    def describe(self) -> str:
        """One line for people, empty if there is nothing to tell."""
        parts = [
            f"left out {self.without_text:,} documents without text" if self.without_text else "",
            f"{self.empty_files:,} files hold no document" if self.empty_files else "",
            f"replaced lone surrogates by U+FFFD in {self.repaired:,} documents" if self.repaired else "",
        ]
        return "; ".join(part for part in parts if part)


class Spool(NamedTuple):
    """Contents of one spool."""

    documents: np.ndarray
    """[documents] SPOOL_DTYPE."""
    omissions: Omissions


@dataclass(frozen=True)
class SpoolTask:
    """Inputs that become one spool file."""

    number: int
    inputs: tuple[InputFile, ...]
    folder: Path
    text_key: str
    limit_bytes: int | None
    """Stop after the document that reaches this many bytes of text."""
    tokens: TokenRange | None = None
    """Given when the inputs hold tokens."""

    @property
    def data_path(self) -> Path:
        """File with the text."""
        return spool_path(self.folder, self.number)

    @property
    def index_path(self) -> Path:
        """File with the documents' places; exists only when the spool is complete."""
        return self.data_path.with_suffix(".npz")


def spool_path(folder: Path, number: int) -> Path:
    """File with the text of one spool."""
    return folder / f"spool-{number:05d}.bin"


def plan_spools(
    inputs: Sequence[InputFile],
    folder: Path,
    *,
    text_key: str,
    limit_bytes: int | None,
    tokens: TokenRange | None = None,
) -> list[SpoolTask]:
    """Group inputs, in order, into tasks of about 16 MiB of files."""
    groups: list[list[InputFile]] = []
    filled = _TASK_BYTES
    for file in inputs:
        if filled >= _TASK_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += file.bytes
    return [SpoolTask(i, tuple(group), folder, text_key, limit_bytes, tokens) for i, group in enumerate(groups)]


def spool_documents(task: SpoolTask, report: Report) -> Spool:
    """Write one spool, or take the finished one.

    Raises:
        DataError: An input cannot be read.
    """
    if task.index_path.exists():
        with np.load(task.index_path, allow_pickle=False) as archive:
            spool = Spool(archive["documents"], Omissions(*archive["omissions"].tolist()))
        total = sum(file.bytes for file in task.inputs)
        report(Counts(len(spool.documents), bytes=int(spool.documents["bytes"].sum()), input_bytes=total))
        return spool
    with atomic_write(task.data_path) as file:
        spool = _write_documents(DocumentStream(task, report), file)
    with atomic_write(task.index_path) as file:
        omissions = spool.omissions
        counts = [omissions.without_text, omissions.empty_files, omissions.repaired]
        np.savez(file, documents=spool.documents, omissions=np.array(counts))
    return spool


class DocumentStream:
    """Documents of a task as bytes, those without text left out and counted; reports progress.

    Args:
        task: What to read.
        report: Called about every MiB of text and at the end of every file.
    """

    def __init__(self, task: SpoolTask, report: Report) -> None:
        self._task = task
        self._report = report
        self.omissions = Omissions()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the documents; errors of the readers."""
        limit, size = self._task.limit_bytes, 0
        for file in self._task.inputs:
            reader = _TokenReader(file, self._task.tokens) if self._task.tokens else _TextReader(file, self._task)
            documents = reported = read = pending = 0
            for data in reader:
                pending, size = pending + len(data), size + len(data)
                documents += 1
                yield data
                if pending >= _REPORT_BYTES or (limit is not None and size >= limit):
                    read, reported = min(reader.bytes_read, file.bytes), read
                    self._report(Counts(documents, bytes=pending, input_bytes=read - reported))
                    documents = pending = 0
                if limit is not None and size >= limit:
                    self.omissions += reader.omissions
                    return
            self._report(Counts(documents, bytes=pending, input_bytes=file.bytes - read))
            self.omissions += reader.omissions


class _TextReader:
    def __init__(self, file: InputFile, task: SpoolTask) -> None:
        self._documents = DocumentReader(file, text_key=task.text_key)
        self.omissions = Omissions()

    @property
    def bytes_read(self) -> int:
        return self._documents.bytes_read

    def __iter__(self) -> Iterator[bytes]:
        without_text = repaired = 0
        self.omissions = Omissions(empty_files=1)
        for text in self._documents:
            self.omissions = Omissions(without_text, 0, repaired)
            if not text.strip():
                without_text += 1
                self.omissions = Omissions(without_text, 0, repaired)
                continue
            try:
                data = text.encode()
            except UnicodeEncodeError:
                # JSON can hold lone surrogates; a pair of escapes was joined by the parser.
                data = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace").encode()
                repaired += 1
                self.omissions = Omissions(without_text, 0, repaired)
            yield data


class _TokenReader:
    def __init__(self, file: InputFile, tokens: TokenRange) -> None:
        self._file = file
        self._tokens = tokens
        self.bytes_read = 0
        self.omissions = Omissions()

    def __iter__(self) -> Iterator[bytes]:
        reader = MegatronReader(self._file.path)
        without_text = 0
        for ids in reader.documents(**self._tokens._asdict()):
            if ids.size:
                yield ids.astype("<u4").tobytes()
            else:
                without_text += 1
        self.omissions = Omissions(without_text, int(len(reader.edges) == 1))


def _write_documents(documents: DocumentStream, file: IO[bytes]) -> Spool:
    entries: list[tuple[int, int, int]] = []
    position = 0
    for data in documents:
        file.write(data)
        entries.append((position, len(data), content_hash(data)))
        position += len(data)
    return Spool(np.array(entries, dtype=SPOOL_DTYPE), documents.omissions)


def content_hash(data: bytes) -> int:
    """64-bit hash of a document."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_documents_at(folder: Path, places: np.ndarray) -> list[bytes]:
    """Documents at `places` (fields spool, offset, bytes), in that order; each spool is opened once.

    Args:
        folder: Folder of the spools.
        places: [documents] structured array.
    """
    documents = [b""] * len(places)
    by_spool = np.argsort(places["spool"], kind="stable")
    starts = np.flatnonzero(np.diff(places["spool"][by_spool], prepend=-1))
    for group in np.split(by_spool, starts[1:]):
        with spool_path(folder, int(places["spool"][group[0]])).open("rb") as file:
            for row in group.tolist():
                file.seek(int(places["offset"][row]))
                documents[row] = file.read(int(places["bytes"][row]))
    return documents
