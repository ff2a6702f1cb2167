"""The model of megatron-core and our layers equals a plain PyTorch GPT, loss and every gradient."""

import json
from pathlib import Path

from tests.testing import torchrun


def test_loss_and_gradients_equal_a_plain_pytorch_gpt(tmp_path: Path) -> None:
    output = tmp_path / "differences.json"
    torchrun("tests.distributed.plain_gpt", str(output), nproc=1)
    differences = json.loads(output.read_text())
    assert len(differences) == 9
    assert {name: value for name, value in differences.items() if not value < 1e-10} == {}
