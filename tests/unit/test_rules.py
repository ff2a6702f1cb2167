"""Rules, global paths and warm-ups."""

import pytest
from torch.nn import Linear, Module, ModuleList

from qsparse_layers.config import QSparseConfig, Warmup, layer_format
from qsparse_layers.rules import global_paths
from qsparse_layers.schedules import Schedule
from qsparse_layers.stats import LayerSparsity, model_sparsity


class Layer(Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number  # megatron-core counts from 1 over the whole model
        self.mlp = Linear(2, 2)


def test_paths_count_layers_of_the_whole_model() -> None:
    stage = Module()
    stage.decoder = Module()
    stage.decoder.layers = ModuleList([Layer(13), Layer(14)])
    paths = [path for path, _ in global_paths(stage)]
    assert "decoder.layers.12.mlp" in paths and "decoder.layers.13.mlp" in paths
    assert "decoder.layers.0.mlp" not in paths


def test_first_matching_rule_wins_and_replaces_only_its_keys() -> None:
    config = QSparseConfig(
        sparsity=0.4,
        weights="ternary",
        rules=(
            {"match": "decoder.layers.0.*", "sparsity": 0.0},
            {"match": "*.linear_fc2", "weights": "full"},
            {"match": "*", "sparsity": 0.9},
        ),
    )
    formats = {
        path: layer_format(config, path)
        for path in ("decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.mlp.linear_fc2", "decoder.layers.10.x")
    }
    found = {path: (layout.sparsity, layout.weights) for path, layout in formats.items()}
    assert found == {
        "decoder.layers.0.mlp.linear_fc2": (0.0, "ternary"),
        "decoder.layers.1.mlp.linear_fc2": (0.4, "full"),
        "decoder.layers.10.x": (0.9, "ternary"),
    }


def test_impossible_formats_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rescale=l2 cancels under activations=int8"):
        QSparseConfig(sparsity=0.5, rescale="l2", activations="int8")
    with pytest.raises(ValueError, match=r"sparsity=0.4 is not of the form 1 - N/32; nearest: 0.40625"):
        QSparseConfig(sparsity=0.4, pattern="block")
    with pytest.raises(ValueError, match=r"rules\[0\] \(match='\*'\): pattern=block keeps N of block_size=32"):
        QSparseConfig(sparsity=0.4, rules=({"match": "*", "pattern": "block"},))


def test_warmup_ramps_linearly() -> None:
    ramp = Warmup(start=10, steps=20)
    assert [ramp.fraction(step) for step in (0, 9, 10, 15, 20, 30, 99)] == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert [Warmup(start=5).fraction(step) for step in (4, 5)] == [0.0, 1.0]


def test_schedule_scales_sparsity_and_moves_blocks_in_whole_features() -> None:
    config = QSparseConfig(sparsity=0.5, pattern="block", block_size=4, sparsity_warmup=Warmup(steps=10))
    schedule = Schedule(config)
    found = []
    for step in (0, 4, 5, 9, 10):
        schedule.step = step
        found.append(schedule.sparsity(config))
    assert found == [0.0, 0.0, 0.25, 0.25, 0.5]


def test_model_sparsity_is_weighted_as_in_the_paper() -> None:
    """arXiv 2407.10969 table 2, Mistral-7B: the printed shares of zeros give the printed overall sparsity."""
    weights = {"qkv": 4096 * 6144, "out": 4096 * 4096, "up": 4096 * 14336, "gate": 4096 * 14336, "down": 14336 * 4096}
    for shares, overall in (((51.4, 50.0, 50.0, 50.0, 80.0), 58.2), ((42.0, 40.0, 40.0, 40.0, 60.4), 45.7)):
        rows = zip(weights.items(), shares, strict=True)
        layers = [LayerSparsity(name, share / 100, 0.0, count) for (name, count), share in rows]
        assert model_sparsity(layers)[0] * 100 == pytest.approx(overall, abs=0.06)
