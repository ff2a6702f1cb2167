"""What the trainer reads: sample numbers in, windows of tokens out.

The trainer counts consumed samples and asks for the numbers it needs, in any grouping; which tokens they are is fixed
by `order.py`.  So a checkpoint holds that count and the dataset's `fingerprint`, and training may go on with another
number of ranks, microbatches or workers.  A thread prefetches: pread and crc32 release the GIL, while handing windows
between worker processes would cost more than reading them.
"""

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.chunks import ChunkReader
from pipeline.data.errors import DataError
from pipeline.data.manifest import Split, load_manifest
from pipeline.data.order import BLOCK_RUNS, MAX_RUN_WINDOWS, ORDER_VERSION, WindowOrder


class WindowDataset:
    """Windows of `seq_length + 1` tokens of one split: inputs are `window[:-1]`, labels `window[1:]`.

    Args:
        path: Dataset folder.
        split: `train` or `val`.
        seq_length: Tokens the model sees per sample.
        seed: Selects the sample order.

    Raises:
        DataError: The dataset is incomplete or damaged, has no such split, or no window of that length.
    """

    def __init__(self, path: Path, split: Split, *, seq_length: int, seed: int) -> None:
        manifest = load_manifest(path)
        self._reader = ChunkReader(path, manifest, split)
        self._seq_length = seq_length
        windows = np.maximum(self._reader.tokens_per_chunk - 1, 0) // seq_length
        if not windows.sum():
            longest = int(self._reader.tokens_per_chunk.max(initial=0))
            raise DataError(
                f"{path}: split '{split}' has no window of {seq_length + 1} tokens, its longest chunk holds {longest}; "
                "use a shorter seq_length, more text, a larger --val-share or larger --chunk-tokens"
            )
        self._order = WindowOrder(windows, seed=seed)
        self.num_windows = self._order.num_windows
        """Windows per epoch."""
        self.vocab_size = manifest.vocab_size
        self.eod_id = manifest.eod_id
        self.tokenizer_path = path / manifest.tokenizer.file
        parts = (manifest.identity(), split, seq_length, seed, ORDER_VERSION, BLOCK_RUNS, MAX_RUN_WINDOWS)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        """Hash of everything that maps a sample number to tokens; a resumed run must find the same."""

    def windows(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        """Tokens of samples of the endless stream.

        Args:
            samples: Sample numbers, from 0, any order.

        Returns:
            [len(samples), seq_length + 1] token ids.

        Raises:
            DataError: A chunk cannot be read or is damaged.
            ValueError: A sample number is negative.
        """
        places = self._order.locate(samples)
        out = np.empty((len(samples), self._seq_length + 1), dtype=np.int64)
        for row, (chunk, window) in enumerate(zip(places.chunk.tolist(), places.window.tolist(), strict=True)):
            out[row] = self._reader.read(chunk, window * self._seq_length, self._seq_length + 1)
        return out

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


class Prefetcher:
    """Reads windows ahead in one thread.

    Args:
        dataset: Dataset that only this prefetcher uses until `close`.
        batches: Lists of sample numbers, taken in order; may be endless.
        depth: Batches read ahead.
    """

    def __init__(self, dataset: WindowDataset, batches: Iterable[Sequence[int]], *, depth: int = 2) -> None:
        self._dataset = dataset
        self._ready: queue.Queue[npt.NDArray[np.int64] | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._read, args=(iter(batches),), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> npt.NDArray[np.int64]:
        """Windows of the next list, [samples, seq_length + 1]; an error of the thread is raised here."""
        if self._over:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, np.ndarray):
            return item
        self._over = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop reading and wait for the thread; the dataset stays open."""
        self._over = True
        self._closed.set()
        self._thread.join()

    def _read(self, batches: Iterator[Sequence[int]]) -> None:
        try:
            for samples in batches:
                if not self._put(self._dataset.windows(samples)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: npt.NDArray[np.int64] | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
