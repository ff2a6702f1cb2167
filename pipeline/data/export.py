"""A prepared dataset as Megatron's indexed dataset: one .bin and .idx per split, documents in the stored order.

The crc32 of every chunk is checked on the way.  Documents are found by their
EOD, which no document holds inside; a document that goes on in the next chunk becomes whole again, and the padding of
a packed dataset (EOD after EOD) is left out.
"""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import DataError
from pipeline.data.manifest import DatasetManifest, Split, load_manifest
from pipeline.data.megatron_format import MegatronWriter, megatron_dtype
from pipeline.data.parallel import Counts
from pipeline.data.progress import StageProgress
from pipeline.data.shards import ShardIndex, atomic_write, index_path


class Exported(NamedTuple):
    """What was written for one split."""

    prefix: Path
    """PREFIX of PREFIX.bin and PREFIX.idx, Megatron's `--data-path`."""
    documents: int
    tokens: int


def export_megatron(
    folder: Path, output: Path, *, overwrite: bool = False, stream: TextIO = sys.stderr
) -> list[Exported]:
    """Write OUTPUT/SPLIT.bin and OUTPUT/SPLIT.idx for every split.

    Args:
        folder: Dataset folder.
        output: Folder to write to; made if missing.
        overwrite: Replace files of these names.
        stream: Where progress is shown.

    Raises:
        DataError: The dataset is incomplete or damaged, or a file is there already.
    """
    manifest = load_manifest(folder)
    splits: list[Split] = [split for split, records in manifest.splits.items() if records]
    for path in (output / f"{split}{suffix}" for split in splits for suffix in (".bin", ".idx")):
        if path.exists() and not overwrite:
            raise DataError(f"{path}: exists already; choose another --output, or pass --overwrite to replace it")
        path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    return [_export_split(folder, manifest, split, output / split, stream) for split in splits]


def _export_split(folder: Path, manifest: DatasetManifest, split: Split, prefix: Path, stream: TextIO) -> Exported:
    documents = tokens = 0
    dtype = megatron_dtype(manifest.vocab_size)
    total = sum(record.tokens for record in manifest.splits[split]) * dtype.itemsize
    with (
        StageProgress(f"export {split}", total_bytes=total, stream=stream) as progress,
        atomic_write(prefix.with_suffix(".idx")) as index,
    ):
        # The index becomes visible last: without it the .bin is not a dataset.
        with atomic_write(prefix.with_suffix(".bin")) as file:
            writer = MegatronWriter(file, dtype=dtype)
            for part in _documents(folder, manifest, split):
                for document in part:
                    writer.add_document(document)
                size = sum(document.size for document in part)
                progress.update(Counts(len(part), size, size * dtype.itemsize))
                documents, tokens = documents + len(part), tokens + size
        writer.write_index(index)
    return Exported(prefix, documents, tokens)


def _documents(folder: Path, manifest: DatasetManifest, split: Split) -> Iterator[list[npt.NDArray[Any]]]:
    """Documents that end in each chunk, EOD included."""
    begun: npt.NDArray[Any] = np.empty(0, manifest.token_dtype)
    for record in manifest.shards_of(split, folder):
        for part in _chunks(folder / record.name, manifest):
            tokens = np.concatenate((begun, part))
            *whole, begun = np.split(tokens, np.flatnonzero(tokens == manifest.eod_id) + 1)
            yield [document for document in whole if document.size > 1]
    assert not begun.size, "a split ends with an EOD"


def _chunks(shard: Path, manifest: DatasetManifest) -> Iterator[npt.NDArray[Any]]:
    with shard.open("rb") as file:
        for number, chunk in enumerate(ShardIndex.load(index_path(shard)).chunks):
            file.seek(int(chunk["offset"]))
            data = file.read(int(chunk["tokens"]) * manifest.token_dtype.itemsize)
            if zlib.crc32(data) != chunk["crc32"]:
                raise DataError(
                    f"{shard}: chunk {number} at byte {chunk['offset']} was damaged; "
                    f"see what else is wrong with `qsparse data verify {shard.parent}`"
                )
            yield np.frombuffer(data, manifest.token_dtype)
