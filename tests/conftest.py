"""Fixtures that several folders share."""

import io
from pathlib import Path

import pytest

from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import prepare


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 MB of the standard library's source in several shards, 512 token ids; read only."""
    folder = tmp_path_factory.mktemp("stdlib") / "dataset"
    options = PrepareOptions(
        output=folder, max_megabytes=1, vocab_size=512, chunk_tokens=8192, shard_tokens=100_000, val_share=0.1, seed=0
    )
    prepare(options, workers=1, stream=io.StringIO())
    return folder
