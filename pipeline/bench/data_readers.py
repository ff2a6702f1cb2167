"""Every loader as the same thing: an endless iterator over int64 sequences of seq_length + 1 tokens.

Each runs in a process of its own, `python -m pipeline.bench.data_readers NAME FOLDER SEQ_LENGTH TOKENS`, and prints
one JSON object: the CPU time (user and system, all threads and children, from getrusage) and wall time of `TOKENS`
tokens after a warm-up.  Shuffling is on wherever the loader has it.
"""

import contextlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bench.data_formats import DTYPE, EOD, VOCAB_SIZE

Sequences = Iterator[npt.NDArray[np.int64]]
BATCH = 64
"""Sequences that loaders with batches give at once."""


def ours(folder: Path, seq_length: int, shuffle: str) -> Sequences:
    """WindowDataset, read in the calling thread; the first read of each chunk checks its crc32."""
    from pipeline.data.loader import OrderOptions, SourceFiles, WindowDataset
    from pipeline.data.phases import Phase

    dataset = WindowDataset(
        [SourceFiles(folder / "chunks")],
        "train",
        phases=[Phase(0, 0, (1.0,), seq_length, BATCH)],
        order=OrderOptions(shuffle=shuffle),
    )
    for first in itertools.count(0, BATCH):
        yield from dataset.windows(range(first, first + BATCH))


def ours_with_boundaries(folder: Path, seq_length: int, shuffle: str) -> Sequences:
    """The same, and the boundaries of the documents of every sequence."""
    from pipeline.data.boundaries import cumulative_lengths

    for sequence in ours(folder, seq_length, shuffle):
        cumulative_lengths(sequence[None, :-1], EOD)
        yield sequence


def memmap(folder: Path, seq_length: int) -> Sequences:
    """Random windows of a flat file: no format, no checks, no order to resume."""
    tokens = np.memmap(folder / "flat.bin", dtype=DTYPE, mode="r")
    generator = np.random.default_rng(0)
    while True:
        begin = int(generator.integers(0, len(tokens) - seq_length - 1))
        yield tokens[begin : begin + seq_length + 1].astype(np.int64)


def webdataset_documents(folder: Path, seq_length: int) -> Sequences:
    """One member per document, shuffled, concatenated and cut."""
    return _cut((s["tokens.npy"] for s in _webdataset(folder / "webdataset", shuffle=1000)), seq_length)


def webdataset_chunks(folder: Path, seq_length: int) -> Sequences:
    """Our shards through the stock webdataset: whole chunks, cut."""
    return _cut((s["tokens.npy"] for s in _webdataset(folder / "chunks", shuffle=0)), seq_length)


def _webdataset(folder: Path, shuffle: int) -> Iterator[dict[str, Any]]:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    while True:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards))
        yield from (dataset.shuffle(shuffle) if shuffle else dataset).decode()


def _cut(arrays: Iterator[npt.NDArray[Any]], seq_length: int) -> Sequences:
    rest = np.empty(0, DTYPE)
    for array in arrays:
        tokens = np.concatenate((rest, array)) if rest.size else array
        count = (len(tokens) - 1) // seq_length
        for window in range(count):
            yield tokens[window * seq_length : (window + 1) * seq_length + 1].astype(np.int64)
        rest = tokens[max(count, 0) * seq_length :]


def energon(folder: Path, seq_length: int) -> Sequences:
    """Our shards through Megatron-Energon without workers; a task encoder cuts chunks into sequences."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        TextSample,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_train_dataset,
        stateless,
    )

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        return TextSample(**basic_sample_keys(sample), text=sample["tokens.npy"])

    class Cut(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            tokens = np.asarray(sample.text)
            for number in range((len(tokens) - 1) // seq_length):
                window = tokens[number * seq_length : (number + 1) * seq_length + 1].astype(np.int64)
                yield TextSample.derive_from(sample, text=window)

        def batch(self, samples: Any) -> Any:
            return [sample.text for sample in samples]

    dataset = get_train_dataset(
        str(folder / "energon"),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Cut(),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
    )
    for batch in get_loader(dataset):
        yield from (np.asarray(sequence) for sequence in batch)


def mosaicml(folder: Path, seq_length: int) -> Sequences:
    """MosaicML Streaming, shuffled, without workers."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    while True:
        for sample in dataset:
            yield np.frombuffer(sample["tokens"], dtype=DTYPE).astype(np.int64)


def megatron_gpt(folder: Path, seq_length: int, *, boundaries: bool) -> Sequences:
    """megatron-core's GPTDataset; with boundaries it resets positions and masks EOD."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split as MegatronSplit

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        split="1,0,0",
        reset_position_ids=boundaries,
        reset_attention_mask=False,
        eod_mask_loss=boundaries,
        create_attention_mask=False,
        path_to_cache=str(folder / "megatron" / "cache"),
        tokenizer=_Tokenizer(),
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(str(folder / "megatron" / "train"), mmap=True)
    documents = np.arange(len(indexed), dtype=np.int32)
    samples = int(indexed.sequence_lengths.sum()) // seq_length
    dataset = GPTDataset(indexed, None, documents, samples, MegatronSplit.train, config)
    for number in itertools.count():
        sample = dataset[number % len(dataset)]
        yield np.append(sample["tokens"], sample["labels"][-1])


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod = pad = EOD
    vocab_size = VOCAB_SIZE
    unique_identifiers = {"class": "none"}  # noqa: RUF012


READERS: dict[str, Callable[[Path, int], Sequences]] = {
    "memmap (limit)": memmap,
    "ours": lambda folder, length: ours(folder, length, "windows"),
    "ours, chunk order": lambda folder, length: ours(folder, length, "chunks"),
    "ours, boundaries": lambda folder, length: ours_with_boundaries(folder, length, "windows"),
    "Megatron GPTDataset": lambda folder, length: megatron_gpt(folder, length, boundaries=False),
    "Megatron GPTDataset, boundaries": lambda folder, length: megatron_gpt(folder, length, boundaries=True),
    "WebDataset, chunks": webdataset_chunks,
    "WebDataset, documents": webdataset_documents,
    "Energon, chunks": energon,
    "MosaicML Streaming": mosaicml,
}
"""What is measured, by name."""
FORMATS = {"Energon, chunks": "energon", "MosaicML Streaming": "mds"}
"""Formats of the readers whose formats are optional."""


def measure(sequences: Sequences, seq_length: int, num_tokens: int, warm_up_tokens: int) -> dict[str, float]:
    """CPU and wall seconds of `num_tokens` tokens.

    Raises:
        ValueError: a sequence has another shape or dtype than it must.
    """
    for sequence in itertools.islice(sequences, max(1, warm_up_tokens // seq_length)):
        if sequence.shape != (seq_length + 1,) or sequence.dtype != np.int64:
            raise ValueError(f"expected int64 [{seq_length + 1}], got {sequence.dtype} {sequence.shape}")
    count = num_tokens // seq_length
    cpu, wall, total = _cpu_seconds(), time.perf_counter(), 0
    for sequence in itertools.islice(sequences, count):
        total += sequence.size - 1
    return {"tokens": total, "cpu_seconds": _cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(name: str, folder: str, seq_length: str, num_tokens: str) -> None:
    """Measure one reader and print the result; a package that is missing is a result, too."""
    with contextlib.redirect_stdout(sys.stderr):  # some loaders print
        try:
            sequences = READERS[name](Path(folder), int(seq_length))
            result: dict[str, Any] = dict(measure(sequences, int(seq_length), int(num_tokens), int(num_tokens) // 4))
        except ImportError as error:
            result = {"absent": f"not installed ({error.name})"}
    print(json.dumps(result), flush=True)
    os._exit(0)  # some loaders leave threads and shared memory that take their time


if __name__ == "__main__":
    main(*sys.argv[1:])
