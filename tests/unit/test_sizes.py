"""Parameter counts against the paper's model sizes and against hand-counted small models."""

import csv
import shlex
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.config_loader import load_config
from pipeline.plan.model_costs import activated_parameters, total_parameters
from pipeline.plan.search import memory_of_run
from pipeline.reporter import describe_device
from pipeline.sizes import flops_per_token, model_size, peak_flops

ROOT = Path(__file__).parents[2]


def gpt(hidden: int, ffn: int, heads: int, layers: int, **model) -> Config:
    shape = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads, "num_layers": layers}
    return Config(model={**shape, **model})


@pytest.mark.parametrize(
    ("hidden", "ffn", "heads", "layers", "billions"),
    [
        (1024, 2730, 16, 24, 0.302),
        (1536, 4096, 24, 24, 0.679),
        (2048, 5460, 32, 24, 1.208),
        (4096, 11008, 32, 32, 6.476),
    ],
)
def test_projections_are_the_papers_sizes(hidden: int, ffn: int, heads: int, layers: int, billions: float) -> None:
    """arXiv 2407.10969 names models by non-embedding size; its appendix B has the shapes."""
    assert model_size(gpt(hidden, ffn, heads, layers), 32000).projections / 1e9 == pytest.approx(billions, abs=1e-3)


def test_mistral_7b_with_grouped_queries() -> None:
    config = gpt(4096, 14336, 32, 32, num_query_groups=8)
    assert model_size(config, 32000).projections == 6_979_321_856


def test_experts_count_whole_and_active() -> None:
    moe = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32, "layer_frequency": 2}
    size = model_size(gpt(64, 128, 4, 4, moe=moe), 256)
    attention, dense, expert = 4 * 4 * 64 * 64, 2 * 3 * 64 * 128, 3 * 64 * 32
    assert size.projections == attention + dense + 2 * 8 * expert
    assert size.active_projections == attention + dense + 2 * 2 * expert
    norms, routers = (2 * 4 + 1) * 64, 2 * 8 * 64
    assert size.other == norms + routers
    with_gains = model_size(gpt(64, 128, 4, 4, moe=moe, qsparse={"sub_norm": True}), 256)
    assert with_gains.other == size.other + 4 * 64 + 2 * 128 + 2 * 8 * 32  # attention, dense FFNs, each expert
    assert with_gains.projections == size.projections


def test_flops_follow_the_formula() -> None:
    config = gpt(64, 128, 4, 2)
    size = model_size(config, 256)
    assert flops_per_token(config, 256) == 6 * (size.projections + 256 * 64) + 12 * 2 * 64 * 256


def test_memory_is_that_of_measured_runs() -> None:
    with (ROOT / "tests/plan/measured.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for row in rows:
        config = load_config(ROOT / row["config"], shlex.split(row["overrides"]))
        dp = int(row["gpus"]) // config.parallel.model_size
        if row["memory_gib"]:
            estimate = memory_of_run(config, 32000, dp)
            assert estimate == pytest.approx(float(row["memory_gib"]) * 2**30, rel=0.02), row["name"]
    assert memory_of_run(Config(training={"precision": "fp32"}), 256, dp=1) is None


@pytest.mark.parametrize("recipe", ["moe_demo", "moe_8x1b", "moe_fine_grained", "gpt_1.3b", "quickstart"])
def test_parameters_of_recipes_are_those_of_the_plan(recipe: str) -> None:
    config = load_config(ROOT / f"configs/{recipe}.yaml", ["model.vocab_size=32000"])
    size = model_size(config, 32000)
    assert size.total == total_parameters(config)
    assert size.active_projections * (1 - config.model.qsparse.sparsity) == pytest.approx(activated_parameters(config))
    assert 0 < size.other < 0.01 * size.projections


def test_peak_is_known_for_known_devices_only() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("Some CPU") is None


def test_the_device_line_says_what_computes() -> None:
    found = {
        (device, kernels, backend): describe_device(
            device, Config(run={"kernels": kernels, "backend": backend, "device": "cuda" if device else "cpu"})
        ).split("; ")
        for device, kernels, backend in [("", "auto", "auto"), ("H100", "auto", "te"), ("H100", "reference", "local")]
    }
    assert found["", "auto", "auto"][2:4] == ["reference kernels", "attention of megatron-core"]
    assert found["H100", "auto", "te"][:4] == ["H100", "fp32", "Triton kernels", "attention of Transformer Engine"]
    assert found["H100", "reference", "local"][2:4] == ["reference kernels", "attention of megatron-core"]
