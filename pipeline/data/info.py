"""What a dataset holds: splits, shards, document lengths, and how many documents a sequence length cuts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pipeline.data.loader import SourceFiles
from pipeline.data.manifest import DatasetManifest, Split

_THREADS = 8
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
    last: npt.NDArray[np.bool_]
    """Documents whose EOD is the last token of a chunk, which is a label only."""

    @property
    def inputs(self) -> npt.NDArray[np.int64]:
        """Tokens of each document that may be inputs."""
        return self.lengths - self.last

    def cut(self, seq_length: int) -> npt.NDArray[np.bool_]:
        """Which documents do not lie in one window of `seq_length` inputs."""
        end = self.starts + np.maximum(self.inputs, 1) - 1
        crosses: npt.NDArray[np.bool_] = self.starts // seq_length != end // seq_length
        return crosses | self.continued


def document_statistics(files: SourceFiles, split: Split) -> DocumentStatistics:
    """Read the document lengths of a split.

    Raises:
        DataError: The split or one of its shards is missing or damaged.
    """
    reader = files.open(split, check_files=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = list(pool.map(reader.document_lengths, range(len(reader.index.chunks))))
    pieces = np.concatenate(chunks)
    starts = np.concatenate([np.cumsum(lengths) - lengths for lengths in chunks])
    ends_chunk = np.zeros(len(pieces), dtype=np.bool_)
    ends_chunk[np.cumsum([len(lengths) for lengths in chunks]) - 1] = True
    closed = ~ends_chunk
    closed[ends_chunk] = [len(c) == n for c, n in zip(chunks, reader.index.chunks["documents"], strict=True)]
    first = np.flatnonzero(np.concatenate(([True], closed[:-1])))
    return DocumentStatistics(
        starts[first], np.add.reduceat(pieces, first), ~closed[first], (ends_chunk & closed)[first]
    )


def print_info(files: SourceFiles, *, seq_lengths: Sequence[int], console: Console) -> None:
    """Print tables of a dataset.

    Args:
        files: The dataset.
        seq_lengths: Sequence lengths to count cut documents for.
        console: Where to print.
    """
    manifest = files.manifest
    tokenizer = manifest.tokenizer
    console.print(f"[bold]{files.path}[/]: {', '.join(manifest.source)}; licence {manifest.license or 'not stated'}")
    console.print(
        f"tokenizer {tokenizer.name} ({manifest.vocab_size} ids, encoded with {tokenizer.encoder}), {manifest.dtype}, "
        f"EOD {manifest.eod_id}, about {manifest.chunk_tokens:,} tokens per chunk"
    )
    console.print(f"made by: {manifest.command}", highlight=False)
    present: list[Split] = [split for split, records in manifest.splits.items() if records]
    statistics = {split: document_statistics(files, split) for split in present}
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
            cut, fits = part.cut(seq_length), part.inputs <= seq_length
            cells += [f"{cut.mean():.1%}", f"{cut[fits].mean():.1%}" if fits.any() else "-"]
        table.add_row(str(seq_length), *cells)
    return table
