"""What the trainer reads: sample numbers in, windows of tokens out.

    sample  --phases, mixing-->  source, draw  --order-->  epoch, chunk, window  --chunks, stores-->  tokens

The trainer counts consumed samples and asks for the numbers it needs, in any grouping and from any number of threads;
which tokens they are is fixed by the left part of this line, which is pure.  So a checkpoint holds that count, the
dataset's `fingerprint` and the chunks known to be bad, and training may go on with another number of ranks,
microbatches or threads.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.bad_chunks import BadChunk, BadChunks, substitute
from pipeline.data.chunks import ChunkReader
from pipeline.data.errors import BadChunkError, DataError
from pipeline.data.index import combine_index
from pipeline.data.manifest import DatasetManifest, Split, load_manifest
from pipeline.data.mixing import MixingError, Mixture, block_size
from pipeline.data.order import ORDER_VERSION, Places, Shuffle, SourceOrder, make_order
from pipeline.data.phases import Phase
from pipeline.data.remote import RemoteFolder, RemoteOptions, RemoteStore, fetch_metadata, is_remote
from pipeline.data.stores import Store

LARGE_SPLIT_TOKENS = 2**27
"""`shuffle="auto"`: splits with more tokens are read chunk by chunk."""
_MAX_SUBSTITUTES = 100


@dataclass(frozen=True)
class OrderOptions:
    """What decides the order besides datasets and phases."""

    seed: int = 0
    shuffle: str = "auto"
    """`windows`, `chunks`, or `auto` by size."""
    interleave: int | None = None
    """Columns that chunks are read in; absent: the global batch size of each phase."""


class SourceFiles:
    """One dataset: its dataset.json and where its shards are.

    Args:
        path: folder or address.
        remote: how to read an address.

    Raises:
        DataError: it is not there, incomplete or not valid.
    """

    def __init__(self, path: str | Path, remote: RemoteOptions | None = None) -> None:
        self.path = str(path)
        self.store: Store | None = None
        if is_remote(self.path):
            options = remote or RemoteOptions()
            address = RemoteFolder(self.path, options)
            self.folder = fetch_metadata(address, options.cache)
            self.store = RemoteStore(address, self.folder, options.cache_bytes)
        else:
            self.folder = Path(path)
        self.manifest: DatasetManifest = load_manifest(self.folder)

    def combine_index(self, split: Split, *, check_files: bool) -> None:
        """Write the combined index of a large split; for one process, before the others open it."""
        combine_index(self.folder, self.manifest, split, check_files=check_files and self.store is None)

    def open(self, split: Split, *, check_files: bool) -> ChunkReader:
        """A reader of the split's chunks."""
        return ChunkReader(self.folder, self.manifest, split, store=self.store, check_files=check_files)


class _Source:
    """One dataset of the mixture, open for reading."""

    def __init__(self, files: SourceFiles, split: Split, shuffle: str, *, check_files: bool) -> None:
        self.files, self.split = files, split
        self.reader = files.open(split, check_files=check_files)
        tokens = sum(record.tokens for record in files.manifest.splits[split])
        self.shuffle: Shuffle = "chunks" if tokens > LARGE_SPLIT_TOKENS else "windows"
        if shuffle != "auto":
            self.shuffle = "chunks" if shuffle == "chunks" else "windows"

    def windows(self, seq_length: int) -> npt.NDArray[np.int32]:
        """Windows of each chunk."""
        self._check_packing(seq_length)
        windows = self.reader.index.windows(seq_length)
        if not windows.any():
            longest = int(self.reader.tokens_per_chunk.max(initial=0))
            raise DataError(
                f"{self.files.path}: split '{self.split}' has no window of {seq_length + 1} tokens, its longest chunk "
                f"holds {longest}; use a shorter seq_length, more text, a larger --val-share or larger --chunk-tokens"
            )
        return windows

    def _check_packing(self, seq_length: int) -> None:
        packing = self.files.manifest.packing
        if packing is not None and seq_length % packing.seq_length:
            raise DataError(
                f"{self.files.path}: packed for windows of {packing.seq_length} tokens, seq_length={seq_length} would "
                f"cut its documents anywhere; use training.seq_length={packing.seq_length} or a multiple, or prepare "
                "the dataset without packing"
            )


class WindowDataset:
    """Windows of `seq_length + 1` tokens of one split: inputs are `window[:-1]`, labels `window[1:]`.

    Args:
        sources: the datasets of the mixture.
        split: `train` or `val`.
        phases: weights and sequence length over the samples; the first from sample 0.
        order: seed and kind of order.
        bad_chunks: where chunks that cannot be read are noted and gone around; absent: reading one is an error.
        check_files: compare the size of every local shard with dataset.json.

    Raises:
        DataError: A dataset is incomplete or damaged, has no such split, no window of that length, or another tokenizer
            than the others.
    """

    def __init__(
        self,
        sources: Sequence[SourceFiles],
        split: Split,
        *,
        phases: Sequence[Phase],
        order: OrderOptions | None = None,
        bad_chunks: BadChunks | None = None,
        check_files: bool = True,
    ) -> None:
        options = order or OrderOptions()
        check_same_tokenizer(sources)
        self._sources = [_Source(files, split, options.shuffle, check_files=check_files) for files in sources]
        self._bad_chunks, self._seed = bad_chunks, options.seed
        columns = [options.interleave or phase.global_batch_size for phase in phases]
        if not any(source.shuffle == "chunks" for source in self._sources):
            columns = [1] * len(phases)  # random access: the order need not know the batch size
        try:
            self._mixture = Mixture(phases, [block_size(len(sources), count) for count in columns])
        except MixingError as error:
            raise DataError(f"data.sources: {error}") from None
        self._windows = {
            (stretch, number): source.windows(length)
            for stretch, length in enumerate(self._mixture.lengths)
            for number, source in enumerate(self._sources)
        }
        self._orders: dict[tuple[int, int], SourceOrder] = {
            (stretch, number): make_order(
                self._sources[number].shuffle,
                windows,
                (options.seed, "stretch", stretch),
                self._mixture.layouts(stretch, number),
            )
            for (stretch, number), windows in self._windows.items()
        }
        self.num_windows = sum(self._orders[0, number].num_windows for number in range(len(sources)))
        """Windows per epoch, of all sources at the first sequence length."""
        manifest = sources[0].manifest
        self.vocab_size, self.eod_id = manifest.vocab_size, manifest.eod_id
        self.tokenizer_path = sources[0].folder / manifest.tokenizer.file
        self.description = self._describe(split, phases, columns)
        """Everything that maps a sample number to tokens, as JSON values; a resumed run must have the same."""
        text = json.dumps(self.description, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        """Hash of `description`."""

    def _describe(self, split: Split, phases: Sequence[Phase], columns: list[int]) -> dict[str, Any]:
        return {
            "order version": ORDER_VERSION,
            "split": split,
            "data.seed": self._seed,
            "datasets": [source.files.manifest.identity() for source in self._sources],
            "data.shuffle": [source.shuffle for source in self._sources],
            "phases": [
                {
                    "first sample": phase.first_sample,
                    "weights": [weight / sum(phase.weights) for weight in phase.weights],
                    "seq_length": phase.seq_length,
                    "data.interleave": count,
                }
                for phase, count in zip(phases, columns, strict=True)
            ],
        }

    def windows(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        """Tokens of samples of the endless stream; threads may call it at once.

        Args:
            samples: Sample numbers, from 0, any order, all of one sequence length.

        Returns:
            [len(samples), seq_length + 1] token ids.

        Raises:
            DataError: A chunk cannot be read or is damaged.
            ValueError: A sample number is negative.
        """
        numbers = np.asarray(samples, dtype=np.int64).reshape(-1)
        if numbers.size and numbers.min() < 0:
            raise ValueError(f"sample numbers start at 0, got {numbers.min()}")
        stretches, sources, draws = self._mixture.locate(numbers)
        if numbers.size and stretches.min() != stretches.max():
            raise ValueError(f"samples {numbers.min()} to {numbers.max()} have different sequence lengths")
        stretch = int(stretches[0]) if numbers.size else 0
        out = np.empty((len(numbers), self._mixture.lengths[stretch] + 1), dtype=np.int64)
        for source in range(len(self._sources)):
            rows = np.flatnonzero(sources == source)
            if rows.size:
                out[rows] = self._read(stretch, source, self._orders[stretch, source].locate(draws[rows]))
        return out

    def _read(self, stretch: int, source: int, places: Places) -> npt.NDArray[Any]:
        """[n, seq_length + 1] tokens in the stored dtype, joined as bytes: cheaper than n small arrays."""
        reader, length = self._sources[source].reader, self._mixture.lengths[stretch]
        epochs, chunks, windows = (numbers.tolist() for numbers in places)
        if self._bad_chunks is None:
            parts = [reader.read(c, w * length, length + 1) for c, w in zip(chunks, windows, strict=True)]
        else:
            parts = [
                self._read_or_substitute(self._bad_chunks, stretch, source, *place)
                for place in zip(epochs, chunks, windows, strict=True)
            ]
        return np.frombuffer(b"".join(parts), dtype=reader.dtype).reshape(len(parts), length + 1)

    def _read_or_substitute(
        self, bad: BadChunks, stretch: int, source: int, epoch: int, chunk: int, window: int
    ) -> bytes:
        reader, length = self._sources[source].reader, self._mixture.lengths[stretch]
        windows = self._windows[stretch, source]
        place = (self._seed, stretch, epoch, chunk, window)
        candidate: tuple[int, int] | None = (chunk, window)
        for attempt in range(_MAX_SUBSTITUTES):
            if candidate is not None:
                shard, number = reader.index.place(candidate[0])
                name = reader.index.records[shard].name
                if (source, name, number) not in bad:
                    try:
                        return reader.read(candidate[0], candidate[1] * length, length + 1)
                    except BadChunkError as error:
                        bad.add(BadChunk(source, name, number, str(error)))
                        bad.check_share(len(windows), str(error))
            candidate = substitute(windows, place, attempt)
        raise DataError(f"{self._sources[source].files.path}: {_MAX_SUBSTITUTES} windows in a row cannot be read")

    def close(self) -> None:
        """Close the shards."""
        for source in self._sources:
            source.reader.close()


def open_windows(path: str | Path, split: Split, *, seq_length: int, seed: int = 0) -> WindowDataset:
    """One dataset, one sequence length: for looking at data outside of a run.

    Raises:
        DataError: as for `WindowDataset`.
    """
    return WindowDataset(
        [SourceFiles(path)], split, phases=[Phase(0, 0, (1.0,), seq_length, 1)], order=OrderOptions(seed=seed)
    )


def check_same_tokenizer(sources: Sequence[SourceFiles]) -> None:
    """Refuse to mix datasets of different tokenizers.

    Raises:
        DataError: names the first two that differ.
    """
    first = sources[0]
    for other in sources[1:]:
        one, two = first.manifest, other.manifest
        if (one.tokenizer.sha256, one.eod_id) != (two.tokenizer.sha256, two.eod_id):
            raise DataError(
                f"data.sources: {first.path} was made with tokenizer {one.tokenizer.name} "
                f"({one.tokenizer.sha256[:12]}, EOD {one.eod_id}) and {other.path} with {two.tokenizer.name} "
                f"({two.tokenizer.sha256[:12]}, EOD {two.eod_id}); prepare both with the same --tokenizer"
            )
