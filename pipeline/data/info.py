"""What a dataset holds: splits, shards, document lengths, and how many documents a sequence length cuts."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pipeline.data.index import open_index
from pipeline.data.manifest import DatasetManifest, ShardRecord, Split, load_manifest

_EDGES = (0, 64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class DocumentStatistics:
    """Documents of a split."""

    starts: npt.NDArray[np.int64]
    """Position of each document's first token inside its chunk."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document, EOD included."""
    continued: npt.NDArray[np.bool_]
    """Documents that go on in the next chunk."""

    def cut(self, seq_length: int) -> npt.NDArray[np.bool_]:
        """Which documents do not lie in one window of `seq_length` inputs."""
        last = self.starts + self.lengths - 1
        crosses: npt.NDArray[np.bool_] = self.starts // seq_length != last // seq_length
        return crosses | self.continued


def document_statistics(folder: Path, split: Split) -> DocumentStatistics:
    """Read the document lengths of a split.

    Raises:
        DataError: The split or one of its shards is missing or damaged.
    """
    manifest = load_manifest(folder)
    starts: list[int] = []
    lengths: list[int] = []
    continued: list[bool] = []
    for record in manifest.shards_of(split, folder):
        open_part = False
        for doclens, documents in _chunk_lengths(folder, record, manifest):
            begin = np.cumsum(doclens) - doclens
            first = 0
            if open_part:  # the first piece belongs to the document that the last chunk left open
                lengths[-1] += int(doclens[0])
                first = 1
            starts += begin[first:].tolist()
            lengths += doclens[first:].tolist()
            continued += [False] * (len(doclens) - first)
            open_part = documents < len(doclens)
            if open_part:
                continued[-1] = True
    return DocumentStatistics(np.array(starts), np.array(lengths), np.array(continued, dtype=np.bool_))


def _chunk_lengths(
    folder: Path, record: ShardRecord, manifest: DatasetManifest
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    index = open_index(folder, record, manifest.dtype)
    with tarfile.open(folder / record.name) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".doclens.npy")]
        for member, chunk in zip(members, index.chunks, strict=True):
            file = tar.extractfile(member)
            assert file is not None
            yield np.load(io.BytesIO(file.read()), allow_pickle=False).astype(np.int64), int(chunk["documents"])


def print_info(folder: Path, *, seq_lengths: Sequence[int], console: Console) -> None:
    """Print tables of a dataset.

    Args:
        folder: Dataset folder.
        seq_lengths: Sequence lengths to count cut documents for.
        console: Where to print.
    """
    manifest = load_manifest(folder)
    tokenizer = manifest.tokenizer
    console.print(f"[bold]{folder}[/]: {', '.join(manifest.source)}; licence {manifest.license or 'not stated'}")
    console.print(
        f"tokenizer {tokenizer.name} ({manifest.vocab_size} ids, encoded with {tokenizer.encoder}), {manifest.dtype}, "
        f"EOD {manifest.eod_id}, about {manifest.chunk_tokens:,} tokens per chunk"
    )
    console.print(f"made by: {manifest.command}", highlight=False)
    present: list[Split] = [split for split, records in manifest.splits.items() if records]
    statistics = {split: document_statistics(folder, split) for split in present}
    console.print(_splits_table(manifest))
    console.print(_lengths_table(statistics))
    console.print(_cut_table(statistics, seq_lengths))


def _splits_table(manifest: DatasetManifest) -> Table:
    table = Table("split", "shards", "chunks", "documents", "tokens", "MB", title="Splits", title_justify="left")
    for split, records in manifest.splits.items():
        sums = [sum(getattr(record, name) for record in records) for name in ("chunks", "documents", "tokens")]
        size = sum(record.bytes for record in records) / 1e6
        table.add_row(split, str(len(records)), *(f"{value:,}" for value in sums), f"{size:,.1f}")
    return table


def _lengths_table(statistics: dict[Split, DocumentStatistics]) -> Table:
    table = Table("tokens", *statistics, title="Document lengths (EOD included)", title_justify="left")
    counts = [np.histogram(part.lengths, bins=[*_EDGES, np.inf])[0] for part in statistics.values()]
    labels = [f"{low} to {high - 1}" for low, high in pairwise(_EDGES)]
    labels.append(f"{_EDGES[-1]} and more")
    for row, label in enumerate(labels):
        table.add_row(label, *(f"{int(count[row]):,}" for count in counts))
    for name, share in (("median", 50), ("90th percentile", 90)):
        table.add_row(name, *(f"{np.percentile(part.lengths, share):,.0f}" for part in statistics.values()))
    return table


def _cut_table(statistics: dict[Split, DocumentStatistics], seq_lengths: Sequence[int]) -> Table:
    columns = [column for split in statistics for column in (f"{split}: all", f"{split}: that would fit")]
    table = Table("seq_length", *columns, title="Share of documents cut by a window's edge", title_justify="left")
    for seq_length in seq_lengths:
        cells: list[str] = []
        for part in statistics.values():
            cut, fits = part.cut(seq_length), part.lengths <= seq_length
            cells += [f"{cut.mean():.1%}", f"{cut[fits].mean():.1%}" if fits.any() else "-"]
        table.add_row(str(seq_length), *cells)
    return table
