"""A checkpoint of a mixture goes on under any expert-parallel layout, optimizer state included.

megatron-core gives experts an optimizer of their own under expert parallelism only, and raises a KeyError when such a
state meets a run without; our experts have their own always (`moe.layer`).  The distributed optimizer stores float32
moments even of a float64 model, so all layouts begin from the stored checkpoint, and its cases are not quantized: the
rounding would flip single codes.
"""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.moe.cases import BIAS, CLASSIC, DENSE, FULL, case
from tests.testing import torchrun

SHARDED = {"distributed_optimizer": True}
CASES = {
    "ep2": {
        "from": case(FULL, "fp64", CLASSIC, {"ep": 2}),
        "to": {"dp2": case(FULL, "fp64", CLASSIC), "tp2": case(FULL, "fp64", CLASSIC, {
            "tp": 2, "etp": 1, "sequence_parallel": True})},
    },
    "dp2": {"from": case(FULL, "fp64", BIAS), "to": {"ep2": case(FULL, "fp64", BIAS, {"ep": 2})}},
    "ep2-sharded-optimizer": {
        "from": case(DENSE, "fp64", CLASSIC, {"ep": 2, **SHARDED}),
        "to": {"dp2": case(DENSE, "fp64", CLASSIC, SHARDED)},
    },
    "dp2-sharded-optimizer": {
        "from": case(DENSE, "fp64", CLASSIC, SHARDED),
        "to": {"ep2": case(DENSE, "fp64", CLASSIC, {"ep": 2, **SHARDED})},
    },
}  # fmt: skip


@cache
def losses() -> dict[str, dict[str, list[float]]]:
    with TemporaryDirectory() as folder:
        cases, output = Path(folder, "cases.json"), Path(folder, "losses.json")
        cases.write_text(json.dumps(CASES))
        torchrun("tests.moe.reshard", str(cases), str(Path(folder, "checkpoints")), str(output), nproc=2)
        return json.loads(output.read_text())


@pytest.mark.parametrize(("name", "other"), [(name, other) for name, values in CASES.items() for other in values["to"]])
def test_other_layout_goes_on_as_the_same_one_would(name: str, other: str) -> None:
    found = losses()[name]
    assert found[other] == pytest.approx(found["same"], rel=1e-9)
    assert found["same"][-1] < found["same"][0]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    found = losses()[name]
    tolerance = 1e-6 if "sharded" in name else 1e-12  # float32 moments come back from the distributed optimizer's file
    assert found["same"] == pytest.approx(found["uninterrupted"], rel=tolerance)
