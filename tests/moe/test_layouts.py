"""Mixtures train under every expert-parallel layout as one process does: same model, same real text, same losses.

Tolerances as in `tests.distributed.test_layouts`; what is measured in fp64 is a few 1e-16 (docs/moe.md).  Cases without
`dispatch: full` send int8 codes.  Groups of layouts share a launch.
"""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.moe.cases import BIAS, CAPACITY, CLASSIC, DENSE, FINE, FULL, NO_SUB_NORM, SHARED, case
from tests.testing import torchrun

GATHER = {**CLASSIC, "dispatcher": "allgather"}
EP, TP = {"ep": 2}, {"tp": 2, "sequence_parallel": True}
OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
"""With more replicas than experts are spread over, each gathers weights of experts from others."""

REFERENCES = {
    "classic": case(FULL, "fp64", CLASSIC),
    "shared": case(FULL, "fp64", SHARED),
    "bias": case(FULL, "fp64", BIAS, steps=10),
    "fine": case(FULL, "fp64", FINE, steps=6),
    "no_sub_norm": case(NO_SUB_NORM, "fp64", CAPACITY, steps=10),
    "dense-fp32": case(DENSE, "fp32", CLASSIC),
}
LAYOUTS = {
    2: {
        "classic:ep2-alltoall": case(FULL, "fp64", CLASSIC, EP),
        "classic:ep2-allgather-full": case(FULL, "fp64", {**GATHER, "dispatch": "full"}, EP),
        "classic:ep2-alltoall-full-grouped": case(
            FULL, "fp64", {**CLASSIC, "dispatch": "full", "execution": "grouped"}, EP
        ),
        "shared:ep2-grouped-distributed-optimizer": case(
            FULL, "fp64", {**SHARED, "execution": "grouped"}, {**EP, "distributed_optimizer": True}
        ),
        "bias:ep2": case(FULL, "fp64", BIAS, EP, steps=10),
        "fine:ep2-allgather": case(FULL, "fp64", {**FINE, "dispatcher": "allgather"}, EP, steps=6),
        "no_sub_norm:ep2-capacity": case(NO_SUB_NORM, "fp64", CAPACITY, EP, steps=10),
        "dense-fp32:ep2": case(DENSE, "fp32", CLASSIC, EP),
        "classic:dp2-overlap": case(FULL, "fp64", CLASSIC, OVERLAP),
        "classic:dp2-overlap-grouped": case(FULL, "fp64", {**CLASSIC, "execution": "grouped"}, OVERLAP),
    },
    4: {
        "classic:ep2-tp2-alltoall": case(FULL, "fp64", CLASSIC, {**EP, **TP, "etp": 1}),
        "shared:ep2-etp2-allgather-distributed-optimizer": case(
            FULL, "fp64", {**SHARED, "dispatcher": "allgather"}, {**EP, **TP, "distributed_optimizer": True}
        ),
        "classic:ep2-pp2": case(FULL, "fp64", CLASSIC, {**EP, "pp": 2}),
        "dense-fp32:ep2-dp2": case(DENSE, "fp32", CLASSIC, EP),
    },
}


@cache
def trajectories(nproc: int) -> dict[str, dict[str, list[float]]]:
    with TemporaryDirectory() as folder:
        cases, output = Path(folder, "cases.json"), Path(folder, "losses.json")
        cases.write_text(json.dumps(REFERENCES if nproc == 1 else LAYOUTS[nproc]))
        torchrun("tests.distributed.trajectories", str(cases), str(output), nproc=nproc, timeout=600)
        return json.loads(output.read_text())


@pytest.mark.parametrize(("nproc", "name"), [(nproc, name) for nproc, cases in LAYOUTS.items() for name in cases])
def test_layout_gives_the_losses_of_one_process(nproc: int, name: str) -> None:
    expected, found = trajectories(1)[name.split(":")[0]], trajectories(nproc)[name]
    tolerance = 1e-5 if name.startswith("dense-fp32") else 1e-6
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert found["val"] == pytest.approx(expected["val"], rel=tolerance)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * tolerance)


def test_the_losses_fall_and_differ_between_mixtures() -> None:
    references = trajectories(1)
    for name in ("classic", "shared", "dense-fp32"):
        assert references[name]["loss"][-1] < references[name]["loss"][0] - 1.0
    assert len({round(reference["val"][0], 3) for reference in references.values()}) == len(references)
