"""First pass of a preparation: every document, as UTF-8, into spool files that allow random access.

    .prepare/spool-00000.bin   the documents' bytes, one after the other
    .prepare/spool-00000.npy   [documents] offset, bytes, content hash

Sources may be compressed or huge, so documents cannot be shuffled where they are; the spool costs the corpus's text
once on disk until the preparation is done, and 28 bytes per document in memory when the shuffle is planned.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.data.parallel import Counts, Report
from pipeline.data.shards import atomic_write
from pipeline.data.sources import InputFile, read_documents

SPOOL_DTYPE = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])
_TASK_BYTES = 16 * 2**20
_REPORT_BYTES = 2**20


def spool_path(folder: Path, number: int) -> Path:
    """File with the text of one spool."""
    return folder / f"spool-{number:05d}.bin"


@dataclass(frozen=True)
class SpoolTask:
    """Inputs that become one spool file."""

    number: int
    inputs: tuple[InputFile, ...]
    folder: Path
    text_key: str
    limit_bytes: int | None
    """Stop after the document that reaches this many bytes of text."""

    @property
    def data_path(self) -> Path:
        """File with the text."""
        return spool_path(self.folder, self.number)

    @property
    def index_path(self) -> Path:
        """File with the array of SPOOL_DTYPE; exists only when the spool is complete."""
        return self.data_path.with_suffix(".npy")


def plan_spools(
    inputs: Sequence[InputFile], folder: Path, *, text_key: str, limit_bytes: int | None
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
    return [SpoolTask(i, tuple(group), folder, text_key, limit_bytes) for i, group in enumerate(groups)]


def spool_documents(task: SpoolTask, report: Report) -> np.ndarray:
    """Write one spool, or take the finished one.

    Returns:
        Array of SPOOL_DTYPE; documents without text are left out.

    Raises:
        DataError: An input cannot be read.
    """
    if task.index_path.exists():
        index: np.ndarray = np.load(task.index_path, allow_pickle=False)
        report(Counts(documents=len(index), bytes=int(index["bytes"].sum())))
        return index
    with atomic_write(task.data_path) as file:
        index = _write_documents(_documents(task), file, report)
    with atomic_write(task.index_path) as file:
        np.save(file, index)
    return index


def _documents(task: SpoolTask) -> Iterator[bytes]:
    size = 0
    for source in task.inputs:
        for text in read_documents(source, text_key=task.text_key):
            if not text.strip():
                continue
            # JSON can hold lone surrogates, which no UTF-8 text and no tokenizer has.
            data = text.encode("utf-8", errors="replace")
            yield data
            size += len(data)
            if task.limit_bytes is not None and size >= task.limit_bytes:
                return


def _write_documents(documents: Iterator[bytes], file: IO[bytes], report: Report) -> np.ndarray:
    entries: list[tuple[int, int, int]] = []
    position = 0
    pending = Counts()
    for data in documents:
        file.write(data)
        digest = hashlib.blake2b(data, digest_size=8).digest()
        entries.append((position, len(data), int.from_bytes(digest, "little")))
        position += len(data)
        pending = Counts(documents=pending.documents + 1, bytes=pending.bytes + len(data))
        if pending.bytes >= _REPORT_BYTES:
            report(pending)
            pending = Counts()
    report(pending)
    return np.array(entries, dtype=SPOOL_DTYPE)


def read_documents_at(folder: Path, places: np.ndarray) -> list[str]:
    """Documents at `places` (fields spool, offset, bytes), in that order; each spool is opened once.

    Args:
        folder: Folder of the spools.
        places: [documents] structured array.
    """
    texts = [""] * len(places)
    by_spool = np.argsort(places["spool"], kind="stable")
    starts = np.flatnonzero(np.diff(places["spool"][by_spool], prepend=-1))
    for group in np.split(by_spool, starts[1:]):
        with spool_path(folder, int(places["spool"][group[0]])).open("rb") as file:
            for row in group.tolist():
                file.seek(int(places["offset"][row]))
                texts[row] = file.read(int(places["bytes"][row])).decode()
    return texts
