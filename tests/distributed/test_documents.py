"""Attention inside documents, masked losses and phases: equal to every document alone, and equal under every layout."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.distributed.test_layouts import DP, FULL, MOE, TP_PP_SP, TP_SP, VPP, Trajectory, case
from tests.testing import torchrun

DOCUMENTS = {"attention": "document", "mask_eod_loss": True}
RAMP = {
    "phases": [
        {"from_step": 0, "seq_length": 16, "global_batch_size": 4},
        {"from_step": 4, "seq_length": 16},
        {"from_step": 8},
    ]
}


def with_data(data: dict[str, Any], parallel: dict, **options: Any) -> dict[str, Any]:
    """12 steps with 6 held-out sequences."""
    return {**case(FULL, "fp64", parallel, steps=12, **options), "data": data}


REFERENCES = {
    "documents": with_data(DOCUMENTS, {}),
    "masked": with_data({"mask_eod_loss": True}, {}),
    "ramp": with_data({**DOCUMENTS, **RAMP}, {}),
    "documents-moe": with_data(DOCUMENTS, {}, moe=MOE),
    "plain": with_data({}, {}),
}
LAYOUTS = {
    2: {
        "documents:tp2-sp": with_data(DOCUMENTS, TP_SP),
        "documents:pp2-interleaved": with_data(DOCUMENTS, VPP),
        "documents:dp2": with_data(DOCUMENTS, DP),
        "documents:dp2-recompute-full": with_data(DOCUMENTS, {}, recompute="full"),
        "documents:dp2-recompute-selective": with_data(DOCUMENTS, {}, recompute="selective"),
        "masked:dp2": with_data({"mask_eod_loss": True}, DP),
        "masked:pp2": with_data({"mask_eod_loss": True}, {"pp": 2}),
        "ramp:pp2": with_data({**DOCUMENTS, **RAMP}, {"pp": 2}),
        "ramp:dp2": with_data({**DOCUMENTS, **RAMP}, {}),
        "documents-moe:ep2": with_data(DOCUMENTS, {"ep": 2}, moe=MOE),
    },
    4: {
        "documents:tp2-pp2-sp": with_data(DOCUMENTS, TP_PP_SP),
        "documents:pp4": with_data({**DOCUMENTS, "prefetch_threads": 0}, {"pp": 4}),
        "ramp:tp2-pp2-sp": with_data({**DOCUMENTS, **RAMP, "prefetch_threads": 4}, TP_PP_SP),
    },
}


@cache
def trajectories(nproc: int) -> dict[str, Trajectory]:
    with TemporaryDirectory() as folder:
        cases, output = Path(folder, "cases.json"), Path(folder, "losses.json")
        cases.write_text(json.dumps(REFERENCES if nproc == 1 else LAYOUTS[nproc]))
        torchrun("tests.distributed.trajectories", str(cases), str(output), nproc=nproc, timeout=600)
        return json.loads(output.read_text())


def test_a_packed_document_is_what_it_is_alone(tmp_path: Path) -> None:
    output = tmp_path / "differences.json"
    torchrun("tests.distributed.documents", str(output), nproc=1)
    for name, found in json.loads(output.read_text()).items():
        assert found.pop("without boundaries") > 0.01, "the test would not notice a missing boundary"
        assert {what: value for what, value in found.items() if not value < 1e-6} == {}, name  # logits leave as float32
        assert found["loss"] < 1e-12 and found["masked loss"] < 1e-12 and found["gradients"] < 1e-9, name


@pytest.mark.parametrize(("nproc", "name"), [(nproc, name) for nproc, cases in LAYOUTS.items() for name in cases])
def test_layout_gives_the_losses_of_one_process(nproc: int, name: str) -> None:
    expected, found = trajectories(1)[name.split(":")[0]], trajectories(nproc)[name]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["val"] == pytest.approx(expected["val"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_the_settings_change_the_losses() -> None:
    references = trajectories(1)
    assert len({round(references[name]["val"][0], 4) for name in ("documents", "masked", "ramp", "plain")}) == 4
    for name in ("documents", "ramp"):
        assert references[name]["loss"][-1] < references[name]["loss"][0] - 0.5
