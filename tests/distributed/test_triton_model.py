"""Layers on Triton's kernels, whose rows two processes share: what one process computes, up to the rounding of bf16."""

import json
from pathlib import Path

import pytest
import torch

from tests.testing import torchrun


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu compares two GPUs")
def test_shared_rows_give_the_losses_and_gradients_of_one_process(tmp_path: Path) -> None:
    torchrun("tests.distributed.triton_model", str(tmp_path / "distances.json"), nproc=2)
    found = json.loads((tmp_path / "distances.json").read_text())
    # losses, and four weights with two SubLN gains, or those of attention and of three experts
    assert [len(distances) for distances in found.values()] == [7, 7, 9], found
    for case, distances in found.items():
        for name, distance in distances.items():
            assert distance < (5e-3 if name == "losses" else 5e-2), (case, name, distance)
