"""First half of a dry run: read every input, keep only counts, hashes and a sample of the text; write nothing.

The sample is the documents whose content hash lies below a limit that the size of the files sets: an even draw over the
corpus, for any order of the files and any number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from pipeline.data.dedup import NUM_HASHES, Signatures, minhash, shingles
from pipeline.data.options import PrepareOptions
from pipeline.data.parallel import Report, run_tasks
from pipeline.data.progress import StageProgress
from pipeline.data.sources import InputFile
from pipeline.data.spool import DocumentStream, Omissions, SpoolTask, TokenRange, content_hash, plan_spools

SURVEY_DTYPE = np.dtype([("bytes", "<i8"), ("hash", "<u8")])
_SAMPLE_BYTES = 2**23
_COMPRESSION_RATIO = 3.0
"""Guess of text bytes per byte of a compressed file; only the size of the sample depends on it."""


class Survey(NamedTuple):
    """What the inputs hold."""

    documents: np.ndarray
    """[documents] SURVEY_DTYPE, in the order of the sources."""
    omissions: Omissions
    sample: list[bytes]
    """Some documents, at least one."""
    signatures: list[Signatures]
    """MinHash signatures of all documents, in parts, if near-duplicates are asked for."""


@dataclass(frozen=True)
class SurveyTask:
    """Inputs to read."""

    inputs: SpoolTask
    sample_share: float
    with_signatures: bool


def survey(
    options: PrepareOptions, inputs: Sequence[InputFile], *, tokens: TokenRange | None, workers: int, stream: TextIO
) -> Survey:
    """Read all inputs on several processes; a cap on the text ends the reading where `prepare` ends it.

    Raises:
        DataError: An input cannot be read.
    """
    limit = None if options.max_megabytes is None else int(options.max_megabytes * 1e6)
    spools = plan_spools(inputs, Path(), text_key=options.text_key, limit_bytes=limit, tokens=tokens)
    tasks = [SurveyTask(spool, _sample_share(inputs), options.dedup == "near") for spool in spools]
    parts: dict[int, Survey] = {}
    complete = complete_bytes = 0
    with StageProgress(
        "read",
        total_bytes=limit or sum(file.bytes for file in inputs),
        measure="bytes" if limit else "input_bytes",
        stream=stream,
    ) as progress:
        for number, part in run_tasks(survey_inputs, tasks, workers=workers, report=progress.update):
            parts[number] = part
            while complete in parts:
                complete_bytes += int(parts[complete].documents["bytes"].sum())
                complete += 1
            if limit is not None and complete_bytes >= limit:
                break
    return _merge([parts[number] for number in range(complete)], limit)


def survey_inputs(task: SurveyTask, report: Report) -> Survey:
    """Read the inputs of one task."""
    stream = DocumentStream(task.inputs, report)
    entries: list[tuple[int, int]] = []
    sample: dict[int, bytes] = {}
    smallest = (2**64, b"")
    signatures: list[list[int]] = []
    for data in stream:
        number = content_hash(data)
        entries.append((len(data), number))
        if number < task.sample_share * 2**64:
            sample[number] = data
        smallest = min(smallest, (number, data))
        if task.with_signatures:
            signatures.append(minhash(shingles(data, are_tokens=task.inputs.tokens is not None)))
    documents = np.array(entries, dtype=SURVEY_DTYPE)
    parts = [np.array(signatures, dtype=np.uint32).reshape(-1, NUM_HASHES)] if task.with_signatures else []
    return Survey(documents, stream.omissions, list(sample.values()) or [smallest[1]], parts)


def _sample_share(inputs: Sequence[InputFile]) -> float:
    packed = [file.bytes if file.compression or file.kind == "parquet" else 0 for file in inputs]
    text_bytes = sum(file.bytes for file in inputs) + (_COMPRESSION_RATIO - 1) * sum(packed)
    return _SAMPLE_BYTES / max(text_bytes, _SAMPLE_BYTES)


def _merge(parts: list[Survey], limit: int | None) -> Survey:
    documents = np.concatenate([part.documents for part in parts])
    signatures = [values for part in parts for values in part.signatures]
    if limit is not None:
        before = np.cumsum(documents["bytes"]) - documents["bytes"]
        documents = documents[before < limit]
        signatures = [np.concatenate(signatures)[: len(documents)]] if signatures else []
    sample = [data for part in parts for data in part.sample if data]
    return Survey(documents, sum((part.omissions for part in parts), Omissions()), sample, signatures)
