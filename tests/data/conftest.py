"""Fixtures: datasets prepared from the standard library's source, once for all tests of this folder."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.manifest import DatasetManifest
from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetManifest]:
    """1.5 MB of source text in several small shards; read only."""
    folder = tmp_path_factory.mktemp("corpus") / "dataset"
    options = PrepareOptions(
        output=folder, max_megabytes=1.5, vocab_size=600, chunk_tokens=8192, shard_tokens=100_000, val_share=0.1
    )
    return folder, prepare(options, workers=1, stream=io.StringIO()).manifest


@pytest.fixture
def damaged(corpus: tuple[Path, DatasetManifest], tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the corpus that a test may damage."""

    def copy() -> Path:
        return Path(shutil.copytree(corpus[0], tmp_path / "copy"))

    return copy
