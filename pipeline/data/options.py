"""Options of `qsparse data prepare`: each documented once, where its default is."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.data.errors import DataError
from pipeline.data.manifest import FORMAT_VERSION, DedupMethod, Record
from pipeline.data.shards import file_sha256
from pipeline.data.sources import STDLIB, InputFile
from pipeline.data.tokenizer import EOD_TOKEN


class PrepareOptions(Record):
    """What `qsparse data prepare` makes."""

    sources: tuple[str, ...] = (STDLIB,)
    """`stdlib`, files, folders or glob patterns."""
    output: Path
    """Folder of the dataset."""
    text_key: str = "text"
    """JSON field or parquet column with the text."""
    tokenizer: Path | None = None
    """tokenizer.json to use; absent: train one on the corpus."""
    vocab_size: PositiveInt = 4096
    """Ids of a trained tokenizer, end of document included."""
    tokenizer_megabytes: PositiveFloat = 32
    """Text that a tokenizer is trained on."""
    eod_token: str = EOD_TOKEN
    """Token that ends every document."""
    val_share: float = Field(0.02, ge=0.0, lt=1.0)
    """Share of the documents held out as split `val`."""
    seed: NonNegativeInt = 0
    """Seed of the document shuffle."""
    chunk_tokens: PositiveInt | None = None
    """Tokens per chunk; absent: 2^20, less for small corpora."""
    shard_tokens: PositiveInt | None = None
    """Tokens per shard; absent: 2^28, less for small corpora."""
    max_megabytes: PositiveFloat | None = None
    """Use only about this much text; absent: all."""
    license: str | None = None
    """Licence of the text, recorded in dataset.json."""
    dedup: DedupMethod = "none"
    """Remove documents that repeat an earlier one, or nearly do."""
    near_threshold: float = Field(0.8, ge=0.5, le=1.0)
    """Estimated Jaccard similarity of 5-word shingles from which documents are near-duplicates."""
    pack_seq_length: PositiveInt | None = None
    """Order documents so that windows of this seq_length cut as few as possible; absent: one after the other."""

    def check(self, inputs: Sequence[InputFile]) -> None:
        """Raise a DataError if options contradict each other or the inputs, or the tokenizer is missing."""
        if "near_threshold" in self.model_fields_set and self.dedup != "near":
            raise DataError(f"--near-threshold {self.near_threshold}: needs --dedup near")
        if self.tokenizer is None and inputs[0].kind == "megatron":
            raise DataError(f"{inputs[0].path}: holds tokens; name the tokenizer that made them with --tokenizer")
        if self.tokenizer is None:
            return
        if "vocab_size" in self.model_fields_set:
            raise DataError("--vocab-size is for a tokenizer trained here; leave it out with --tokenizer")
        if not self.tokenizer.is_file():
            raise DataError(f"--tokenizer {self.tokenizer}: no such file")

    def command(self) -> str:
        """Command line that makes the same dataset."""
        words = ["qsparse", "data", "prepare"]
        for source in self.sources:
            words += ["--source", source]
        for name in sorted(self.model_fields_set - {"sources", "output"}):
            value = getattr(self, name)
            if value is not None and value != type(self).model_fields[name].default:
                words += ["--" + name.replace("_", "-"), str(value)]
        return shlex.join([*words, "--output", "DIR"])

    def request(self, inputs: Sequence[InputFile]) -> str:
        """Hash of everything that decides the dataset, as far as it can be known without reading the inputs."""
        # Options that came later count only where they are used: datasets made before them stay up to date.
        later = ("dedup", "near_threshold", "pack_seq_length")
        unused = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        options = self.model_dump(mode="json", exclude={"output", "tokenizer", *unused})
        tokenizer = None if self.tokenizer is None else file_sha256(self.tokenizer)
        files = [{**asdict(file), "path": str(file.path)} for file in inputs]
        text = json.dumps([FORMAT_VERSION, options, tokenizer, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
