"""On GPUs: the same integers as on the CPU, the same losses through NCCL.  `make test-gpu` runs these."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.dispatch import kernels_for
from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import LinearCall, WeightParts
from tests.distributed.test_layouts import DENSE, DP, FULL, MOE, PP, TP, TP_SP, VPP, case
from tests.testing import torchrun

pytestmark = pytest.mark.gpu
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

TOPK = LinearFormat(sparsity=0.4, weights="ternary", activations="int8")
E4M3 = LinearFormat(sparsity=0.4, weights="ternary", activations="int8", gradients="e4m3")
BLOCK = LinearFormat(sparsity=0.5, pattern="block", block_size=32, weights="ternary", activations="int8")


def run_layer(layout: LinearFormat, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(shape, generator=generator) for shape in ((64, 512), (256, 512), (64, 256)))
    x, w = (t.to(device, dtype).requires_grad_() for t in (x, w))
    parts = WeightParts(1, (128, 128))
    y = qsparse_linear(x, w, LinearCall(layout, parts, sparsity=layout.sparsity, kernels=kernels_for(device)))
    y.backward(grad.to(device, dtype))
    assert x.grad is not None and w.grad is not None
    return y.detach().cpu(), x.grad.cpu(), w.grad.cpu()


@pytest.mark.parametrize("layout", [TOPK, BLOCK, E4M3], ids=["topk", "block", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_bit_equal_to_the_cpu(layout: LinearFormat, dtype: torch.dtype) -> None:
    """Integer codes and an exact integer sum leave nothing to the device; the weight scale is a float64 sum."""
    found, expected = run_layer(layout, dtype, "cuda"), run_layer(layout, dtype, "cpu")
    assert torch.equal(found[0], expected[0])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # gradients are float sums in another order
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < tolerance


def train(folder: Path, cases: dict[str, Any], nproc: int) -> dict[str, dict[str, list[float]]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun("tests.distributed.trajectories", str(folder / "cases.json"), str(folder / "out.json"), nproc=nproc)
    return json.loads((folder / "out.json").read_text())


def on_gpu(values: dict[str, Any], backend: str = "local") -> dict[str, Any]:
    return {**values, "run": {"device": "cuda", "backend": backend}}


def test_one_gpu_trains_as_the_cpu_does(tmp_path: Path) -> None:
    """Random numbers differ between devices, so initial weights do, and only the fall of the loss is compared."""
    cases = {
        "dense": on_gpu(case(DENSE, "fp32", {})),
        "full": on_gpu(case(FULL, "bf16", {})),
        "full-fp32": on_gpu(case(FULL, "fp32", {})),
    }
    for name, found in train(tmp_path, cases, nproc=1).items():
        assert found["loss"][0] == pytest.approx(5.56, abs=0.1), name  # ln 256
        assert found["loss"][-1] < found["loss"][0] - 1.2, name


@TWO_GPUS
def test_two_gpus_give_the_losses_of_one(tmp_path: Path) -> None:
    """Over NCCL: unquantized fp32 trajectories to 1e-4, one quantized step in fp32 to 1e-4, bf16 to 1e-2."""
    references = {
        "dense": on_gpu(case(DENSE, "fp32", {})),
        "full-step": on_gpu(case(FULL, "fp32", {}, steps=1)),
        "full-bf16-step": on_gpu(case(FULL, "bf16", {}, steps=1)),
    }
    if find_spec("transformer_engine"):
        references |= {"te": on_gpu(case(DENSE, "bf16", {}), "te")}
    layouts = {"tp2": TP, "tp2-sp": TP_SP, "pp2": PP, "pp2-interleaved": VPP, "dp2-distributed-optimizer": DP}
    cases = {}
    for layout, parallel in layouts.items():
        cases[f"dense:{layout}"] = on_gpu(case(DENSE, "fp32", parallel))
        cases[f"full-step:{layout}"] = on_gpu(case(FULL, "fp32", parallel, steps=1))
        cases[f"full-bf16-step:{layout}"] = on_gpu(case(FULL, "bf16", parallel, steps=1))
    if find_spec("transformer_engine"):  # context parallelism lives in its attention
        cases["te:cp2"] = on_gpu(case(DENSE, "bf16", {"cp": 2}), "te")
    (tmp_path / "one").mkdir()
    expected, found = train(tmp_path / "one", references, 1), train(tmp_path, cases, 2)
    for name, trajectory in found.items():
        reference = name.split(":")[0]
        tolerance = 1e-4 if reference in ("dense", "full-step") else 1e-2
        assert trajectory["loss"] == pytest.approx(expected[reference]["loss"], rel=tolerance), name
        norms, steps = expected[reference]["grad_norm"], 3 if reference == "te" else None  # bf16 spikes differ later
        assert trajectory["grad_norm"][:steps] == pytest.approx(norms[:steps], rel=0.05), name
        after_update = tolerance if reference == "dense" else 10 * tolerance  # Adam's first step is the gradient's sign
        assert trajectory["val"] == pytest.approx(expected[reference]["val"], rel=after_update), name


def test_a_cuda_graph_gives_the_losses_of_its_kernels(tmp_path: Path) -> None:
    """The graph repeats the kernels that the eager step launches."""
    cases = {}
    for name, layout in {"dense": DENSE, "full": FULL}.items():
        values = on_gpu(case(layout, "bf16", {}))
        cases[name] = values
        cases[f"{name}:graph"] = {**values, "run": {**values["run"], "cuda_graph": True}}
    found = train(tmp_path, cases, nproc=1)
    for name in ("dense", "full"):
        assert found[f"{name}:graph"]["loss"] == pytest.approx(found[name]["loss"], rel=1e-3), name


@TWO_GPUS
def test_graphs_hold_collectives_and_let_go_of_them(tmp_path: Path) -> None:
    """NCCL does not take a communicator down while a graph that uses it lives; the processes would never end."""
    cases = {}
    for name, parallel in {"tp2": TP_SP, "dp2": DP}.items():
        values = on_gpu(case(FULL, "bf16", parallel, steps=6))
        cases[name] = values
        cases[f"{name}:graph"] = {**values, "run": {**values["run"], "cuda_graph": True}}
    found = train(tmp_path, cases, nproc=2)
    for name in ("tp2", "dp2"):
        assert found[f"{name}:graph"]["loss"] == pytest.approx(found[name]["loss"], rel=1e-3), name


def test_weights_kept_in_bf16_change_no_loss(tmp_path: Path) -> None:
    """In a graph, which reads the copies where the first captured step found them; attention's gradients vary."""
    plain = on_gpu(case(FULL, "bf16", {}))
    plain["run"] |= {"cuda_graph": True}
    kept = {**plain, "run": {**plain["run"], "keep_bf16_weights": True}}
    found = train(tmp_path, {"plain": plain, "kept": kept}, nproc=1)
    assert found["kept"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-3)


def test_recomputed_projections_change_nothing(tmp_path: Path) -> None:
    """The product of integers is the same the second time; gradients of attention are sums in any order."""
    kept, again = (on_gpu(case(FULL, "bf16", {}, steps=1, recompute=name)) for name in ("none", "up_projection"))
    graph = {**again, "run": {**again["run"], "cuda_graph": True}, "training": {**again["training"], "steps": 6}}
    eager = {**kept, "training": {**kept["training"], "steps": 6}}
    found = train(tmp_path, {"kept": kept, "again": again, "graph": graph, "eager": eager}, nproc=1)
    assert found["again"]["loss"] == found["kept"]["loss"]
    assert found["again"]["grad_norm"] == pytest.approx(found["kept"]["grad_norm"], rel=1e-3)
    assert found["graph"]["loss"] == pytest.approx(found["eager"]["loss"], rel=1e-3)


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine's offloading")
def test_activations_come_back_from_the_host(tmp_path: Path) -> None:
    plain = on_gpu(case(FULL, "bf16", {}), "te")
    offloaded = {**plain, "training": {**plain["training"], "offload_layers": 3}}
    found = train(tmp_path, {"plain": plain, "offloaded": offloaded}, nproc=1)
    assert found["offloaded"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-3)
    assert found["offloaded"]["grad_norm"][:3] == pytest.approx(found["plain"]["grad_norm"][:3], rel=1e-2)


@pytest.mark.parametrize("pattern", ["topk", "block"])
def test_sparse_floats_are_those_of_the_cpu(pattern: str) -> None:
    layout = LinearFormat(sparsity=0.5, pattern=pattern)
    found, expected = run_layer(layout, torch.bfloat16, "cuda"), run_layer(layout, torch.bfloat16, "cpu")
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 2e-2


def test_a_memory_and_two_bit_weights_on_one_gpu(tmp_path: Path) -> None:
    """As a CUDA graph; packed weights give the same bits, and attention rounds otherwise than in a whole pass."""
    backends = ["local", "te"] if find_spec("transformer_engine") else ["local"]
    cases = {}
    for backend in backends:
        cases |= {
            f"{backend}:dense": on_gpu(case(DENSE, "bf16", {}), backend),
            f"{backend}:full": on_gpu(case(FULL, "bf16", {}), backend),
            f"{backend}:experts": on_gpu(case(FULL, "bf16", {}, moe=MOE), backend),
        }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun("tests.distributed.decoded", str(tmp_path / "cases.json"), str(tmp_path / "out.json"), nproc=1)
    for name, found in json.loads((tmp_path / "out.json").read_text()).items():
        assert found["remembers"], name
        assert found["equal"], name
        assert found["packed"] == (not name.endswith("dense")), name
        assert found["distance"] < (0.02 if name.endswith("dense") else 0.5), (name, found)  # single codes flip
