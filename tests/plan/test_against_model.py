"""Parameters and saved activations against real models, to the byte."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from moe.wire import row_bytes as wire_bytes
from pipeline.config import Config
from pipeline.plan.layout import Layout
from pipeline.plan.links import row_bytes
from pipeline.plan.memory import saved_bytes, stage_parameters
from pipeline.plan.model_costs import model_layers
from tests.plan.cases import CASES
from tests.testing import torchrun


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What two processes find in every case."""
    folder: Path = tmp_path_factory.mktemp("plan")
    (folder / "cases.json").write_text(json.dumps(CASES))
    torchrun("tests.plan.real_model", str(folder / "cases.json"), str(folder / "real.json"), nproc=2)
    return json.loads((folder / "real.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_saved_bytes(name: str, real: dict[str, dict[str, int]]) -> None:
    """Of a mixture, the sum over experts of a bias and the like: a few bytes per microbatch are not counted.

    megatron-core 0.19 permutes by indices, 16 bytes per copy of a token, instead of by a map, 5 per token and expert.
    """
    config = Config(**CASES[name])
    layout, layers = Layout.of(config), model_layers(config)
    owned = stage_parameters(config, layout, layers, 0)
    assert owned.sharded + owned.replicated + owned.experts == real[name]["parameters"]
    estimated = saved_bytes(layers.kinds[-1], config, layout)
    if (moe := config.model.moe) is not None and Version(version("megatron-core")) >= Version("0.19"):
        estimated += layout.tokens * (16 * moe.top_k - 5 * moe.num_experts)
    assert real[name]["saved"] - estimated == pytest.approx(0, abs=64 if moe else 0)


def test_the_up_projection_is_all_that_its_recomputation_spares() -> None:
    case = CASES["qsparse bitnet"]
    config = Config(**case)
    less = Config(**{**case, "training": {**case["training"], "recompute": "up_projection"}})
    layer, layout = model_layers(config).kinds[0], Layout.of(config)
    gate_and_up = layout.tokens * 2 * 2 * config.model.ffn_hidden_size
    assert saved_bytes(layer, config, layout) - saved_bytes(layer, less, layout) == gate_and_up


@pytest.mark.parametrize("features", [96, 124, 128, 4096])
def test_rows_of_experts_are_those_on_the_wire(features: int) -> None:
    assert row_bytes(features) == wire_bytes(features)
