"""Where kernels are tested, and fixtures that several folders share.

Kernels run on the GPU where there is one; those tests then have the mark `gpu` and belong to `make test-gpu`.
Elsewhere they run under Triton's interpreter, which has to be chosen before triton loads, and what needs a GPU is
skipped.
"""

import io
import os
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes the fixture `device` is a test of the GPU, if there is one."""
    for item in items:
        if HAS_GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 MB of the standard library's source in several shards, 512 token ids; read only."""
    from pipeline.data.options import PrepareOptions
    from pipeline.data.prepare import prepare

    folder = tmp_path_factory.mktemp("stdlib") / "dataset"
    options = PrepareOptions(
        output=folder, max_megabytes=1, vocab_size=512, chunk_tokens=8192, shard_tokens=100_000, val_share=0.1, seed=0
    )
    prepare(options, workers=1, stream=io.StringIO())
    return folder
