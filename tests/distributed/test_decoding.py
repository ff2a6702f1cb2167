"""A model that remembers predicts what it predicts from the whole text; where it cannot remember, it says so."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.distributed.test_layouts import BLOCK, DENSE, FULL, MOE, PP, TP, TP_SP, case
from tests.testing import torchrun


def squared(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "model": {**values["model"], "activation": "relu2_glu", "tie_embeddings": True}}


CASES = {
    1: {
        "dense": case(DENSE, "fp64", {}),
        "full": squared(case(FULL, "fp64", {})),
        "block": case(BLOCK, "fp64", {}),
        "experts": case(FULL, "fp64", {}, moe=MOE),
        "documents": {**case(FULL, "fp64", {}), "data": {"attention": "document"}},
        "bf16": case(DENSE, "bf16", {}),
        "capacity": case(FULL, "fp64", {}, moe={**MOE, "capacity_factor": 1.0}),
    },
    2: {
        "tp": case(FULL, "fp64", TP),
        "dp": case(DENSE, "fp64", {}),
        "ep": case(FULL, "fp64", {"ep": 2}, moe=MOE),
        "sequence-parallel": case(FULL, "fp64", TP_SP),
        "pipeline": case(FULL, "fp64", PP),
    },
}
WITHOUT_MEMORY = ("capacity", "sequence-parallel", "pipeline")


@cache
def found(nproc: int) -> dict[str, dict[str, Any]]:
    with TemporaryDirectory() as folder:
        cases, output = Path(folder, "cases.json"), Path(folder, "found.json")
        cases.write_text(json.dumps(CASES[nproc]))
        torchrun("tests.distributed.decoded", str(cases), str(output), nproc=nproc)
        return json.loads(output.read_text())


@pytest.mark.parametrize(("nproc", "name"), [(nproc, name) for nproc, cases in CASES.items() for name in cases])
def test_a_memory_changes_no_prediction(nproc: int, name: str) -> None:
    """Logits are compared as float32.  In bf16 other kernels of attention round otherwise, which would flip codes."""
    result = found(nproc)[name]
    assert result["distance"] < (0.02 if name == "bf16" else 1e-6)
    assert result["remembers"] == (name not in WITHOUT_MEMORY)
    assert result["remembers"] == result.get("equal", False)
    full = ["the memory holds 32 tokens and is full", "texts of 49 tokens, the memory holds 32"]
    assert result.get("refused", full) == full
