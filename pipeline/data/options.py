"""Options of `qsparse data prepare`: each documented once, where its default is."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.data.errors import DataError
from pipeline.data.manifest import FORMAT_VERSION, Record
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

    def check_tokenizer(self) -> None:
        """Raise a DataError if the tokenizer's options contradict each other or its file is missing."""
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
        options = self.model_dump(mode="json", exclude={"output", "tokenizer"})
        tokenizer = None if self.tokenizer is None else file_sha256(self.tokenizer)
        files = [{**asdict(file), "path": str(file.path)} for file in inputs]
        text = json.dumps([FORMAT_VERSION, options, tokenizer, files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
