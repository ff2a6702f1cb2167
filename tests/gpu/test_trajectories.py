"""On a GPU: hundreds of steps on Triton kernels lose what steps on the reference lose.

The forward pass is the same integers; gradients are rounded differently, so two trainings part slowly, as any two do
whose sums are ordered differently.  How far that alone takes them is measured along: the reference again, with each
batch in two halves (0.04 nats on a CPU).  Twice that, and a margin for what 8-bit gradients add, is the tolerance.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.trajectories import smoothed
from tests.testing import torchrun

pytestmark = pytest.mark.gpu
STEPS = 150
WINDOW = 10


def case(*, kernels: str = "triton", gradients: str = "full", halves: int = 1, graph: bool = False) -> dict[str, Any]:
    qsparse = {"sparsity": 0.5, "weights": "ternary", "activations": "int8", "sub_norm": True, "gradients": gradients}
    return {
        "run": {"device": "cuda", "kernels": kernels, "cuda_graph": graph},
        "model": {
            **{"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4},
            **{"vocab_size": 256, "qsparse": qsparse},
        },
        "training": {
            **{"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8 // halves, "seq_length": 256},
            **{"precision": "bf16", "eval_interval": 0, "eval_sequences": 16},
        },
        "optimizer": {"lr": 5e-4, "warmup_steps": 20},
        "tracking": {"mlflow": False},
    }


CASES = {
    "reference": case(kernels="reference"),
    "halved": case(kernels="reference", halves=2),
    "exact": case(),
    "exact, graph": case(graph=True),
    "fast": case(gradients="e4m3"),
}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder: Path = tmp_path_factory.mktemp("trajectories")
    (folder / "cases.json").write_text(json.dumps(CASES))
    torchrun("tests.distributed.trajectories", str(folder / "cases.json"), str(folder / "out.json"), nproc=1)
    found: dict[str, dict[str, list[float]]] = json.loads((folder / "out.json").read_text())
    return found


def distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Largest difference of losses, each a mean of ten steps."""
    pairs = zip(smoothed(one["loss"], WINDOW), smoothed(other["loss"], WINDOW), strict=True)
    return max(abs(a - b) for a, b in pairs)


def test_the_reference_learns(trajectories: dict[str, dict[str, list[float]]]) -> None:
    loss = trajectories["reference"]["loss"]
    assert loss[0] > 5.0  # ln 256 = 5.5
    assert smoothed(loss, WINDOW)[-1] < 3.0


@pytest.mark.parametrize(("name", "margin"), [("exact", 0.02), ("exact, graph", 0.02), ("fast", 0.05)])
def test_losses_stay_with_the_reference(
    name: str, margin: float, trajectories: dict[str, dict[str, list[float]]]
) -> None:
    reference, found = trajectories["reference"], trajectories[name]
    rounding = distance(trajectories["halved"], reference)
    limit = 2 * rounding + margin
    parted = distance(found, reference)
    assert parted <= limit, f"{parted:.4f} nats from the reference, rounding alone {rounding:.4f}"
    assert abs(found["val"][0] - reference["val"][0]) <= limit


@pytest.mark.parametrize(("name", "error"), [("exact", 0.005), ("exact, graph", 0.005), ("fast", 0.02)])
def test_the_first_step_is_the_same(name: str, error: float, trajectories: dict[str, dict[str, list[float]]]) -> None:
    """From the same weights: few codes differ, where SubLN's sum has another order; gradients by their rounding."""
    reference, found = trajectories["reference"], trajectories[name]
    assert abs(found["loss"][0] - reference["loss"][0]) < 1e-3
    assert found["grad_norm"][0] == pytest.approx(reference["grad_norm"][0], rel=error)
