"""200 steps of each variant against losses kept as text: whatever changes a number anywhere shows up here.

fp64, so that the losses are the same on every CPU and torch version to far more digits than are compared; the text is
the repository's licence, which never changes.  After an intended change: `python -m tests.convergence.record`, and the
commit says why the losses moved.
"""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.distributed.test_layouts import DENSE, FULL, case
from tests.testing import ROOT, torchrun

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = {
    "dense": DENSE,
    "qsparse": {"sparsity": 0.4},
    "bitnet": {**FULL, "sparsity": 0.0},
    "qsparse_bitnet": FULL,
}


@cache
def trajectories() -> dict[str, list[float]]:
    """Losses of 200 steps of every variant, in one launch."""
    with TemporaryDirectory() as folder:
        cases, output = Path(folder, "cases.json"), Path(folder, "losses.json")
        cases.write_text(json.dumps({name: case(qsparse, "fp64", {}, steps=200) for name, qsparse in VARIANTS.items()}))
        text = str(ROOT / "LICENSE")
        torchrun("tests.distributed.trajectories", str(cases), str(output), text, nproc=1, timeout=600)
        return {name: values["loss"] for name, values in json.loads(output.read_text()).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_trajectory_is_the_golden_one(variant: str) -> None:
    golden = [float(line.split()[1]) for line in (GOLDEN / f"{variant}.txt").read_text().splitlines()]
    assert len(golden) == 200
    assert trajectories()[variant] == pytest.approx(golden, rel=1e-6)


def test_golden_trajectories_learn() -> None:
    for variant in VARIANTS:
        losses = [float(line.split()[1]) for line in (GOLDEN / f"{variant}.txt").read_text().splitlines()]
        assert losses[0] == pytest.approx(math.log(256), abs=0.1)
        assert sum(losses[-10:]) / 10 < losses[0] - 2.5
