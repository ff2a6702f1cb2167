"""Ternary weights gathered as codes: nothing changes but the bytes, in real processes.

Equality is of bits.  It is not guaranteed for every model: the scale is a float64 sum of pieces cut elsewhere, rounded
to float32, and one in some 10^8 such sums lies where that rounds differently (`qsparse_layers.ternary_pieces`).
"""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.distributed.test_layouts import FULL, MOE, case
from tests.testing import torchrun

RESUMED_FROM = 12
DENSE_MODEL = case(FULL, "bf16", {"distributed_optimizer": True})
MIXED = {
    "rules": [{"match": "*.1.*linear_qkv", "weights": "full"}],
    "quantization_warmup": {"start": RESUMED_FROM - 4, "steps": 4},
}
MIXED_MODEL = case(
    {**FULL, **MIXED}, "bf16", {"distributed_optimizer": True, "overlap_grad_reduce": True}, moe=MOE, steps=14
)


def cases() -> dict[str, dict[str, Any]]:
    found = {}
    for name, given in {"dense": DENSE_MODEL, "mixed": MIXED_MODEL}.items():
        small = {**given, "model": {**given["model"], "num_layers": 2}}
        found[f"{name} in bf16"] = small
        found[f"{name} in codes"] = {**small, "parallel": {**given["parallel"], "ternary_param_gather": True}}
    return found


@cache
def results() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        given, output = Path(folder, "cases.json"), Path(folder, "results.json")
        given.write_text(json.dumps(cases()))
        torchrun("tests.distributed.gathers", str(given), str(output), folder, str(RESUMED_FROM), nproc=2)
        return json.loads(output.read_text())


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_training_is_the_same(name: str) -> None:
    in_bf16, in_codes = results()[f"{name} in bf16"], results()[f"{name} in codes"]
    for what in ("losses", "val", "logits", "weights"):
        assert in_codes[what] == in_bf16[what], what
    assert in_codes["losses"][-1] < in_codes["losses"][0] - 1.0


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    whole = results()[f"{name} in codes"]
    assert whole["resumed"]["losses"] == whole["losses"][RESUMED_FROM:]
    for what in ("val", "logits", "weights"):
        assert whole["resumed"][what] == whole[what], what


def test_foreign_weights_stay_behind() -> None:
    in_bf16, in_codes = results()["dense in bf16"], results()["dense in codes"]
    assert in_bf16["kept"] == in_bf16["weights"]
    assert in_codes["kept"] != in_codes["weights"]


def test_bytes_of_a_step() -> None:
    in_bf16, in_codes = results()["dense in bf16"], results()["dense in codes"]
    assert in_bf16["bytes"] == {"allgather torch.bfloat16": 2 * in_bf16["buffers"]}
    others = in_codes["parameters"] - in_codes["ternary"]
    assert in_codes["bytes"] == {
        "allgather torch.uint8": in_codes["ternary"] / 4,  # an eighth of two bytes each
        "allgather torch.bfloat16": 2 * others,
        "alltoall torch.bfloat16": 2 * others / 2,  # dealt out over two ranks
    }


def test_full_weights_travel_during_the_warm_up_of_the_quantization() -> None:
    counted = results()["mixed in codes"]
    assert counted["bytes"]["allgather torch.bfloat16"] == 2 * counted["buffers"]
