"""Experts on GPUs: grouped products against the reference, as a CUDA graph, and spread over two GPUs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import DENSE, FULL, case
from tests.gpu.test_layer_on_gpu import on_gpu, train

pytestmark = pytest.mark.gpu
MIXTURES = {
    "classic": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 64},
    "fine": {"num_experts": 64, "top_k": 8, "ffn_hidden_size": 64, "shared_ffn_hidden_size": 32, "layer_frequency": 2},
}


def mixture(
    moe: dict[str, Any],
    *,
    qsparse: dict[str, Any] = FULL,
    parallel: dict[str, Any] | None = None,
    steps: int = 6,
    **run: Any,
) -> dict[str, Any]:
    values = on_gpu(case(qsparse, "bf16", parallel or {}, steps=steps, moe=moe), "auto")
    return {**values, "run": {**values["run"], **run}}


@pytest.mark.parametrize("name", MIXTURES)
def test_grouped_experts_train_as_the_reference_does(name: str, tmp_path: Path) -> None:
    """Gradients are float sums in other orders, and SubLN's moves single codes; a step of Adam is the sign of both."""
    moe = MIXTURES[name]
    cases = {
        "reference": mixture({**moe, "execution": "sequential"}, kernels="reference"),
        "sequential": mixture({**moe, "execution": "sequential"}),
        "grouped": mixture(moe),
    }
    found = train(tmp_path, cases, nproc=1)
    assert found["grouped"]["loss"][0] == found["sequential"]["loss"][0]
    for run in ("grouped", "sequential"):
        assert found[run]["loss"] == pytest.approx(found["reference"]["loss"], rel=5e-3), run
        assert found[run]["grad_norm"][:3] == pytest.approx(found["reference"]["grad_norm"][:3], rel=5e-2), run


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_bf16_train_as_one_after_the_other(name: str, tmp_path: Path) -> None:
    """As block-sparse products, whose gradients are rounded to bf16 before they are added; also in a graph."""
    moe = MIXTURES[name]
    cases = {
        "sequential": mixture({**moe, "execution": "sequential"}, qsparse=DENSE),
        "block-sparse": mixture(moe, qsparse=DENSE),
    }
    if find_spec("transformer_engine"):
        cases["graph"] = mixture(moe, qsparse=DENSE, cuda_graph=True)
    found = train(tmp_path, cases, nproc=1)
    for run in cases:
        assert found[run]["loss"] == pytest.approx(found["sequential"]["loss"], rel=5e-3), run
        assert found[run]["grad_norm"][:3] == pytest.approx(found["sequential"]["grad_norm"][:3], rel=2e-2), run
        assert found[run]["val"] == pytest.approx(found["sequential"]["val"], rel=5e-3), run


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine's permutation")
@pytest.mark.parametrize("name", MIXTURES)
def test_a_cuda_graph_with_experts_gives_the_losses_of_its_kernels(name: str, tmp_path: Path) -> None:
    """Weights change under the graph, so it has to make their codes anew in every replay."""
    cases = {"eager": mixture(MIXTURES[name], steps=12), "graph": mixture(MIXTURES[name], steps=12, cuda_graph=True)}
    found = train(tmp_path, cases, nproc=1)
    assert found["graph"]["loss"] == pytest.approx(found["eager"]["loss"], rel=2e-3)
    assert found["graph"]["val"] == pytest.approx(found["eager"]["val"], rel=5e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_with_half_of_the_experts_each(tmp_path: Path) -> None:
    """Codes and floats travel to the same result; one step gives one GPU's loss and gradient norm."""
    moe = MIXTURES["classic"]
    (tmp_path / "one").mkdir()
    references = {"codes": mixture(moe, steps=1), "in bf16": mixture(moe, qsparse=DENSE, steps=1)}
    alone = train(tmp_path / "one", references, nproc=1)
    layouts = {"codes": {}, "full": {"dispatch": "full"}, "allgather": {"dispatcher": "allgather"}}
    cases = {name: mixture({**moe, **keys}, parallel={"ep": 2}, steps=1) for name, keys in layouts.items()}
    cases["in bf16"] = mixture(moe, qsparse=DENSE, parallel={"ep": 2}, steps=1)
    found = train(tmp_path, cases, nproc=2)
    for name, run in found.items():
        expected = alone["in bf16" if name == "in bf16" else "codes"]
        assert run["loss"] == pytest.approx(expected["loss"], rel=1e-3), name
        assert run["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2), name
    assert found["codes"]["loss"] == found["full"]["loss"]
