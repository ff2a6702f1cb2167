"""Parameter counts against the paper's model sizes and against hand-counted small models."""

import pytest

from pipeline.config import Config
from pipeline.sizes import flops_per_token, memory_estimate, model_size, peak_flops


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


def test_flops_and_memory_follow_the_formulas() -> None:
    config = gpt(64, 128, 4, 2)
    size = model_size(config, 256)
    assert flops_per_token(config, 256) == 6 * (size.projections + 256 * 64) + 12 * 2 * 64 * 256
    activations = 256 * 4 * 64 * 34 * 4 * 2  # s b h, 34 values of 4 bytes, 2 layers
    assert memory_estimate(config, 256, dp=1) == 16 * size.total + activations


def test_peak_is_known_for_known_devices_only() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("Some CPU") is None
