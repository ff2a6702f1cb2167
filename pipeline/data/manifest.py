"""`dataset.json`: what a token dataset is, in one file that every reader opens first.

    DIR/dataset.json      this record
    DIR/tokenizer.json    Hugging Face tokenizer
    DIR/train-00000.tar   tokens (see shards.py)        DIR/train-00000.tar.idx.npz   its index
    DIR/val-00000.tar     ...

The dataset's identity is a hash of what a model sees (tokenizer, dtype, shard contents), not of how it was made: two
preparations that give the same bytes are the same dataset, wherever they ran.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.errors import DataError
from pipeline.data.shards import atomic_write

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
TOKENIZER_NAME = "tokenizer.json"
WORK_FOLDER = ".prepare"

Split = Literal["train", "val"]
Encoder = Literal["tiktoken", "tokenizers"]
DedupMethod = Literal["none", "exact", "near"]


class Record(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(Record):
    """One shard of a split."""

    name: str
    """File name inside the dataset folder; the index is `NAME.idx.npz`."""
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    """Documents that end in this shard."""
    chunks: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class TokenizerRecord(Record):
    """The tokenizer that made the tokens."""

    file: str = TOKENIZER_NAME
    sha256: str
    name: str
    encoder: Encoder | Literal["imported"]
    """Library that encoded the corpus, both give the same ids; or the ids were imported."""


class DedupRecord(Record):
    """Documents that were removed as duplicates."""

    method: Literal["exact", "near"]
    threshold: float | None = None
    """Estimated Jaccard similarity from which documents are near-duplicates."""
    documents_read: int = Field(ge=0)
    exact_removed: int = Field(ge=0)
    near_removed: int = Field(ge=0)


class PackingRecord(Record):
    """How the documents were packed."""

    seq_length: int = Field(gt=0)
    """Windows of this many inputs begin and end between documents, if they fit."""


class DatasetManifest(Record):
    """Contents of dataset.json."""

    format_version: int = FORMAT_VERSION
    tokenizer: TokenizerRecord
    vocab_size: int = Field(gt=0)
    """Largest token id + 1."""
    dtype: Literal["uint16", "uint32"]
    eod_id: int = Field(ge=0)
    """Token that ends every document."""
    chunk_tokens: int = Field(gt=0)
    splits: dict[Split, tuple[ShardRecord, ...]]
    source: tuple[str, ...]
    license: str | None = None
    command: str
    """Command that makes this dataset again."""
    seed: int
    """Seed of the document shuffle."""
    request: str
    """Hash of options and input files; preparing the same request again is a no-op."""
    dedup: DedupRecord | None = None
    """Absent: duplicates were kept."""
    packing: PackingRecord | None = None
    """Absent: documents follow one another."""

    @property
    def token_dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Little-endian dtype of stored tokens."""
        return np.dtype("<u2") if self.dtype == "uint16" else np.dtype("<u4")

    def identity(self) -> str:
        """Hash of everything that decides which tokens a reader sees."""
        shards = {split: [record.sha256 for record in records] for split, records in self.splits.items()}
        parts = [self.format_version, self.tokenizer.sha256, self.vocab_size, self.dtype, self.eod_id, shards]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def shards_of(self, split: Split, folder: Path) -> tuple[ShardRecord, ...]:
        """Shards of `split`; a DataError names the splits there are."""
        if not self.splits.get(split):
            present = ", ".join(name for name, records in self.splits.items() if records) or "none"
            raise DataError(f"{folder}: no split '{split}' (there are: {present}); prepare it with --val-share above 0")
        return self.splits[split]

    def save(self, folder: Path) -> None:
        """Write dataset.json atomically; its presence means that the dataset is complete."""
        absent = {name for name in ("dedup", "packing") if getattr(self, name) is None}
        with atomic_write(folder / MANIFEST_NAME) as file:
            file.write((self.model_dump_json(indent=2, exclude=absent) + "\n").encode())


def load_manifest(folder: Path) -> DatasetManifest:
    """Read DIR/dataset.json.

    Raises:
        DataError: There is none, it is not valid, or another version of the format wrote it.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if (folder / WORK_FOLDER).is_dir():
            raise DataError(
                f"{folder}: preparation has not finished; run the same prepare command again to complete it"
            )
        raise DataError(f"{folder}: no {MANIFEST_NAME}; make one with `qsparse data prepare --output {folder}`")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version is {version!r}, this qsparse reads {FORMAT_VERSION}; prepare it again")
    try:
        return DatasetManifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: key {key}: {first['msg']}, got {first['input']!r}") from None
