"""`qsparse data prepare --dry-run`: what a preparation would give, without writing anything.

Every document is read, counted and hashed; a sample of about 8 MiB is tokenized.  Token counts are bytes of text over
the sample's bytes per token, so lengths of single documents are estimates (exact for imported tokens).
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pipeline.data.dedup import exact_duplicates, near_duplicates
from pipeline.data.errors import DataError
from pipeline.data.options import PrepareOptions
from pipeline.data.packing import BUFFER_DOCUMENTS, best_fit_decreasing
from pipeline.data.permute import derive_keys, mix64
from pipeline.data.prepare import token_range
from pipeline.data.sources import list_inputs
from pipeline.data.spool import Omissions, TokenRange
from pipeline.data.survey import Survey, survey
from pipeline.data.tokenizer import TextTokenizer, choose_encoder, train_tokenizer

_EDGES = (1, 64, 256, 1024, 4096, 16384, 65536)
_BAR = 24
_PACKED_DOCUMENTS = 200_000
_EQUALITY_DOCUMENTS = 64


@dataclass(frozen=True)
class Encoding:
    """What a sample says of the tokenizer."""

    bytes_per_token: float
    vocab_size: int
    note: str
    """Library and why."""
    tokenizer: str
    tokens_per_second: float
    """Of one core; 0 for imported tokens."""


@dataclass(frozen=True)
class Layout:
    """What windows of one length do to the documents."""

    seq_length: int
    cut: float
    """Share of all documents that a window's edge cuts when documents follow one another."""
    cut_fitting: float
    """The same among documents that would fit a window."""
    packed_cut: float
    """Share of all documents that are cut when they are packed: those longer than a window."""
    padding: float
    """Share of the packed tokens that is padding."""


@dataclass(frozen=True)
class DryRun:
    """Statistics of a preparation."""

    num_files: int
    documents_read: int
    exact_duplicates: int
    near_duplicates: int
    omissions: Omissions
    text_bytes: int
    """Of the documents that stay."""
    lengths: npt.NDArray[np.int64]
    """[documents that stay] estimated tokens with EOD, shuffled."""
    encoding: Encoding
    layouts: tuple[Layout, ...]


def dry_run(options: PrepareOptions, *, seq_lengths: Sequence[int], workers: int, stream: TextIO) -> DryRun:
    """Read the sources and estimate what `prepare` would make of them.

    Raises:
        DataError: A source cannot be read, or holds no text.
    """
    inputs = list_inputs(options.sources)
    options.check(inputs)
    tokens = token_range(options, inputs)
    found = survey(options, inputs, tokens=tokens, workers=workers, stream=stream)
    if not len(found.documents):
        raise DataError("the sources hold no document with text")
    removed = exact_duplicates(found.documents) if options.dedup != "none" else np.zeros(len(found.documents), np.bool_)
    num_exact = int(removed.sum())
    if options.dedup == "near":
        removed |= near_duplicates(found.signatures, threshold=options.near_threshold)
    kept = found.documents[~removed]["bytes"]
    encoding = _imported(options, tokens) if tokens else _encoding(options, found)
    order = np.argsort(mix64(np.arange(len(kept), dtype=np.uint64) ^ derive_keys((options.seed, "documents"), 1)[0]))
    lengths = np.maximum(np.rint(kept[order] / encoding.bytes_per_token), 1).astype(np.int64) + 1
    return DryRun(
        num_files=len(inputs),
        documents_read=len(found.documents),
        exact_duplicates=num_exact,
        near_duplicates=int(removed.sum()) - num_exact,
        omissions=found.omissions,
        text_bytes=int(kept.sum()),
        lengths=lengths,
        encoding=encoding,
        layouts=tuple(layout(lengths, seq_length) for seq_length in seq_lengths),
    )


def layout(lengths: npt.NDArray[np.int64], seq_length: int) -> Layout:
    """Cut documents and padding for one sequence length; padding from the first 200,000 documents."""
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // seq_length != (ends - 1) // seq_length
    fits = lengths <= seq_length
    first = lengths[:_PACKED_DOCUMENTS]
    padding = 0
    for start in range(0, len(first), BUFFER_DOCUMENTS):
        buffer = first[start : start + BUFFER_DOCUMENTS].tolist()
        bins = best_fit_decreasing(buffer, seq_length)
        padding += sum(-sum(buffer[i] for i in members) % seq_length for members in bins)
    return Layout(
        seq_length=seq_length,
        cut=float(cut.mean()),
        cut_fitting=float(cut[fits].mean()) if fits.any() else 0.0,
        packed_cut=float(1 - fits.mean()),
        padding=padding / (padding + int(first.sum())),
    )


def _imported(options: PrepareOptions, tokens: TokenRange) -> Encoding:
    return Encoding(4.0, tokens.vocab_size, "the ids are imported", str(options.tokenizer), 0.0)


def _encoding(options: PrepareOptions, found: Survey) -> Encoding:
    texts = [data.decode() for data in found.sample]
    with tempfile.TemporaryDirectory() as folder:
        path = options.tokenizer
        if path is None:
            path = Path(folder, "tokenizer.json")
            train_tokenizer(texts, path, vocab_size=options.vocab_size, eod_token=options.eod_token)
        encoder, note = choose_encoder(path, texts[:_EQUALITY_DOCUMENTS], eod_token=options.eod_token)
        tokenizer = TextTokenizer(path, eod_token=options.eod_token, encoder=encoder)
    begin = time.process_time()
    num_tokens = sum(tokenizer.encode_array(text).size for text in texts)
    seconds = max(time.process_time() - begin, 1e-9)
    num_bytes = sum(len(data) for data in found.sample)
    return Encoding(
        bytes_per_token=num_bytes / num_tokens,
        vocab_size=tokenizer.vocab_size,
        note=f"{encoder}: {note}",
        tokenizer="trained on the sample" if options.tokenizer is None else str(options.tokenizer),
        tokens_per_second=num_tokens / seconds,
    )


def print_dry_run(result: DryRun, options: PrepareOptions, *, workers: int, console: Console) -> None:
    """Print tables of a dry run."""
    tokens, encoding = int(result.lengths.sum()), result.encoding
    table = Table(show_header=False, title="Dry run: nothing was written", title_justify="left")
    table.add_row("input files", f"{result.num_files:,}")
    table.add_row("documents", f"{result.documents_read:,}")
    if options.dedup != "none":
        near = f", {result.near_duplicates:,} near-duplicates" if options.dedup == "near" else ""
        table.add_row("removed", f"{result.exact_duplicates:,} exact duplicates{near}")
    if omissions := result.omissions.describe():
        table.add_row("reading", omissions)
    table.add_row("text", f"{result.text_bytes / 1e6:,.1f} MB")
    table.add_row("tokens, EOD included", f"about {tokens:,} ({encoding.bytes_per_token:.2f} bytes per token)")
    table.add_row("tokenizer", f"{encoding.tokenizer}, {encoding.vocab_size:,} ids")
    table.add_row("encoder", encoding.note)
    itemsize = 2 if encoding.vocab_size <= 2**16 else 4
    size, spool = tokens * itemsize / 1e6, result.text_bytes / 1e6
    table.add_row("disk", f"about {size:,.1f} MB of shards, and {spool:,.1f} MB while it runs")
    if encoding.tokens_per_second:
        rate = encoding.tokens_per_second
        duration = _duration(tokens / rate / workers)
        table.add_row("encoding", f"about {duration} on {workers} workers of {rate / 1e6:.2f} M tokens/s, and reading")
    console.print(table)
    console.print(_histogram(result.lengths))
    console.print(_layout_table(result.layouts))


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"


def _histogram(lengths: npt.NDArray[np.int64]) -> Table:
    counts = np.histogram(lengths, bins=[*_EDGES, np.inf])[0]
    tokens = np.histogram(lengths, bins=[*_EDGES, np.inf], weights=lengths)[0]
    table = Table("tokens", "documents", "", "share of tokens", title="Document lengths", title_justify="left")
    labels = [f"{low} to {high - 1}" for low, high in pairwise(_EDGES)] + [f"{_EDGES[-1]} and more"]
    for label, count, share in zip(labels, counts.tolist(), tokens / tokens.sum(), strict=True):
        table.add_row(label, f"{count:,}", "█" * -(-count * _BAR // int(counts.max())), f"{share:.1%}")
    return table


def _layout_table(layouts: Sequence[Layout]) -> Table:
    title = "Share of documents cut by a window's edge"
    columns = ("seq_length", "all", "that would fit", "packed: all", "packed: that would fit", "packed: padding")
    table = Table(*columns, title=title, title_justify="left")
    for part in layouts:
        shares = (part.cut, part.cut_fitting, part.packed_cut, 0.0)
        table.add_row(str(part.seq_length), *(f"{share:.1%}" for share in shares), f"{part.padding:.2%}")
    return table
