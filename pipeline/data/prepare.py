"""Sources -> token dataset, in four steps that a kill may interrupt anywhere.

    1 read      inputs -> spools, duplicates left out      a finished spool is kept
    2 tokenizer copied, or trained on the train split      kept
    3 encode    one task per shard -> DIR/*.tar + index    a finished shard is kept
    4 finish    DIR/dataset.json, spools removed

Steps 1 and 3 run on several processes; the result is the same bytes for any number of them.  "Finished" is never
guessed: files are renamed when complete, and a shard's index carries the hash of the task that made it.  Running the
same request on a finished dataset does nothing, and on one with missing or truncated shards it makes just those again.
"""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import numpy as np

from pipeline.data.corpus import CorpusReader
from pipeline.data.encode import EncodeSettings, ShardEncoder, ShardTask, finished_index
from pipeline.data.errors import DataError
from pipeline.data.manifest import (
    TOKENIZER_NAME,
    WORK_FOLDER,
    DatasetManifest,
    Encoder,
    PackingRecord,
    ShardRecord,
    Split,
    TokenizerRecord,
)
from pipeline.data.options import PrepareOptions
from pipeline.data.output import finish_work, locked, refuse_other_contents, start_work, up_to_date
from pipeline.data.parallel import run_tasks
from pipeline.data.plan import choose_chunk_tokens, choose_shard_tokens, cut_shards, split_and_shuffle
from pipeline.data.progress import StageProgress
from pipeline.data.shards import ShardIndex, atomic_write, file_sha256
from pipeline.data.sources import STDLIB, InputFile, list_inputs
from pipeline.data.spool import Omissions, TokenRange, read_documents_at
from pipeline.data.tokenizer import TextTokenizer, choose_encoder, train_tokenizer

_SAMPLE_DOCUMENTS = 64
_SAMPLE_BYTES = 2**20
_SAMPLE_CHARACTERS = 100_000
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class PrepareResult:
    """Outcome of `prepare`."""

    manifest: DatasetManifest
    status: Literal["prepared", "up to date"]
    shards_kept: int
    """Shards that an earlier run had finished."""
    note: str = ""
    """Why the encoder library was chosen."""
    omissions: Omissions = field(default_factory=Omissions)
    padding: int = 0
    """Tokens that packing added to the shards made in this run."""


def default_workers() -> int:
    """Cores this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 8)


def prepare(
    options: PrepareOptions, *, workers: int | None = None, overwrite: bool = False, stream: TextIO = sys.stderr
) -> PrepareResult:
    """Make a token dataset, go on with an unfinished one, or find that it is there.

    Args:
        options: What to make.
        workers: Processes; None takes `default_workers()`.
        overwrite: Replace another dataset in the output folder, and start from scratch.
        stream: Where progress is shown.

    Raises:
        DataError: A source cannot be read, the folder holds something else, another process prepares there, or the
            disk is full.
    """
    inputs = list_inputs(options.sources)
    options.check(inputs)
    request = options.request(inputs)
    if not overwrite and (manifest := up_to_date(options.output, request)) is not None:
        return PrepareResult(manifest, "up to date", sum(map(len, manifest.splits.values())))
    if options.output.exists() and not options.output.is_dir():
        raise DataError(f"--output {options.output}: is a file, expected a folder")
    options.output.mkdir(parents=True, exist_ok=True)
    refuse_other_contents(options.output, request, overwrite)
    try:
        with locked(options.output):
            start_work(options.output, request, overwrite)
            result = _Preparation(options, inputs, request, workers or default_workers(), stream).run()
            result.manifest.save(options.output)
            finish_work(options.output)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise DataError(
            f"{options.output}: {error.strerror}; make room (the text once more and the tokens) and run the same "
            "command again: what is finished is kept"
        ) from None
    return result


def token_range(options: PrepareOptions, inputs: Sequence[InputFile]) -> TokenRange | None:
    """What the ids of imported tokens may be; None when the inputs hold text.

    Raises:
        DataError: `options.tokenizer` is none that can be used, which should be said before the texts are read.
    """
    if options.tokenizer is None:
        return None
    tokenizer = TextTokenizer(options.tokenizer, eod_token=options.eod_token)
    return TokenRange(tokenizer.eod_id, tokenizer.vocab_size) if inputs[0].kind == "megatron" else None


class _Preparation:
    def __init__(
        self, options: PrepareOptions, inputs: Sequence[InputFile], request: str, workers: int, stream: TextIO
    ) -> None:
        self._options = options
        self._inputs = inputs
        self._request = request
        self._workers = workers
        self._stream = stream
        self._work = options.output / WORK_FOLDER

    def run(self) -> PrepareResult:
        options = self._options
        corpus = CorpusReader(
            options, self._inputs, self._work, self._workers, self._stream, token_range(options, self._inputs)
        ).read()
        documents = split_and_shuffle(corpus.documents, val_share=options.val_share, seed=options.seed)
        path, name = self._tokenizer(documents["train"])
        settings, bytes_per_token, note = self._settings(path, documents["train"])
        train_tokens = int(documents["train"]["bytes"].sum()) / bytes_per_token
        shard_bytes = (options.shard_tokens or choose_shard_tokens(train_tokens)) * bytes_per_token
        tasks = self._plan_shards(documents, settings, shard_bytes)
        indexes, kept, padding = self._encode(tasks, settings)
        tokenizer = TextTokenizer(path, eod_token=options.eod_token)
        manifest = DatasetManifest(
            tokenizer=TokenizerRecord(
                sha256=settings.tokenizer_sha256, name=name, encoder=settings.encoder or "imported"
            ),
            vocab_size=tokenizer.vocab_size,
            dtype=settings.dtype,
            eod_id=tokenizer.eod_id,
            chunk_tokens=settings.chunk_tokens,
            splits=_shard_records(tasks, indexes),
            source=options.sources,
            license=options.license or ("PSF-2.0" if set(options.sources) == {STDLIB} else None),
            command=options.command(),
            seed=options.seed,
            request=self._request,
            dedup=corpus.dedup,
            packing=PackingRecord(seq_length=options.pack_seq_length) if options.pack_seq_length else None,
        )
        return PrepareResult(manifest, "prepared", kept, note, corpus.omissions, padding)

    def _settings(self, path: Path, train: np.ndarray) -> tuple[EncodeSettings, float, str]:
        """What all shards have in common, bytes of the spools per token, and why the encoder was chosen."""
        options = self._options
        encoder: Encoder | None = None
        if self._inputs[0].kind == "megatron":
            num_bytes, note = int(train["bytes"].sum()), "the ids were imported"
            num_tokens = num_bytes // 4 + len(train)
            vocab_size = TextTokenizer(path, eod_token=options.eod_token).vocab_size
        else:
            sample = self._sample(train)
            encoder, note = choose_encoder(path, sample, eod_token=options.eod_token)
            tokenizer = TextTokenizer(path, eod_token=options.eod_token, encoder=encoder)
            num_tokens = sum(tokenizer.encode_array(text).size + 1 for text in sample)
            num_bytes, vocab_size = sum(len(text.encode()) for text in sample), tokenizer.vocab_size
        bytes_per_token = num_bytes / num_tokens
        settings = EncodeSettings(
            tokenizer=path,
            tokenizer_sha256=file_sha256(path),
            eod_token=options.eod_token,
            encoder=encoder,
            dtype="uint16" if vocab_size <= 2**16 else "uint32",
            chunk_tokens=options.chunk_tokens or choose_chunk_tokens(int(train["bytes"].sum()) / bytes_per_token),
            spools=self._work,
            pack_seq_length=options.pack_seq_length,
        )
        return settings, bytes_per_token, note

    def _tokenizer(self, train: np.ndarray) -> tuple[Path, str]:
        """Step 2: path inside the dataset and name of the tokenizer."""
        options, path = self._options, self._options.output / TOKENIZER_NAME
        if options.tokenizer is not None:
            with atomic_write(path) as file:
                file.write(options.tokenizer.read_bytes())
            stem = options.tokenizer.stem
            return path, options.tokenizer.resolve().parent.name if stem == "tokenizer" else stem
        if not path.is_file():
            print(f"training a tokenizer of {options.vocab_size} ids", file=self._stream, flush=True)
            texts = self._texts(train, options.tokenizer_megabytes * 1e6)
            train_tokenizer(texts, path, vocab_size=options.vocab_size, eod_token=options.eod_token)
        return path, f"bpe-{options.vocab_size}"

    def _texts(self, documents: np.ndarray, limit_bytes: float) -> Iterator[str]:
        before = np.cumsum(documents["bytes"]) - documents["bytes"]
        chosen = documents[before < limit_bytes]
        for start in range(0, len(chosen), 256):
            for data in read_documents_at(self._work, chosen[start : start + 256]):
                yield data.decode()

    def _sample(self, train: np.ndarray) -> list[str]:
        """Text on which encoders are compared and bytes per token measured."""
        texts = self._texts(train[:_SAMPLE_DOCUMENTS], _SAMPLE_BYTES)
        return [text[:_SAMPLE_CHARACTERS] for text in texts]

    def _plan_shards(
        self, documents: dict[Split, np.ndarray], settings: EncodeSettings, shard_bytes: float
    ) -> list[ShardTask]:
        folder = self._options.output
        return [
            ShardTask(settings, folder / f"{split}-{number:05d}.tar", split, number, part)
            for split, places in documents.items()
            for number, part in enumerate(cut_shards(places, shard_bytes=shard_bytes))
        ]

    def _encode(self, tasks: Sequence[ShardTask], settings: EncodeSettings) -> tuple[list[ShardIndex], int, int]:
        """Step 3: indexes of all shards, how many were there already, and the tokens that packing added."""
        indexes = {i: index for i, task in enumerate(tasks) if (index := finished_index(task)) is not None}
        kept = len(indexes)
        if kept:
            print(f"keeping {kept} of {len(tasks)} shards that are finished", file=self._stream, flush=True)
        missing = [i for i in range(len(tasks)) if i not in indexes]
        total = sum(tasks[i].text_bytes for i in missing)
        with StageProgress("encode", total_bytes=total, stream=self._stream) as progress:
            todo = [tasks[i] for i in missing]
            for number, index in run_tasks(ShardEncoder(settings), todo, workers=self._workers, report=progress.update):
                indexes[missing[number]] = index
        return [indexes[i] for i in range(len(tasks))], kept, progress.done.padding


def _shard_records(tasks: Sequence[ShardTask], indexes: Sequence[ShardIndex]) -> dict[Split, tuple[ShardRecord, ...]]:
    splits: dict[Split, tuple[ShardRecord, ...]] = {}
    for task, index in zip(tasks, indexes, strict=True):
        record = ShardRecord(
            name=task.path.name,
            tokens=index.tokens,
            documents=index.documents,
            chunks=len(index.chunks),
            bytes=index.bytes,
            sha256=index.sha256,
        )
        splits[task.split] = (*splits.get(task.split, ()), record)
    return splits
