"""Every file in configs/ loads, says what it claims, and the committed schema accepts it."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline import yaml12
from pipeline.config_loader import SCHEMA_LINE, differences, json_schema, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_fits_the_schema(path):
    load_config(path)
    jsonschema.validate(yaml12.load(path.read_text()).data, json_schema())
    assert path.read_text().startswith(f"{SCHEMA_LINE}./schema.json\n")


@pytest.mark.parametrize("path", [path for path in RECIPES if "base" not in path.stem], ids=lambda path: path.stem)
def test_run_is_named_after_its_file(path):
    assert load_config(path).run.name == path.stem


def test_committed_schema_is_the_generated_one():
    text = json.dumps(json_schema(), indent=2) + "\n"
    assert (CONFIGS / "schema.json").read_text() == text, "run `qsparse config schema --output configs/schema.json`"


@pytest.mark.parametrize(
    "data",
    [
        {"modle": {}},
        {"model": {"num_layers": 0}},
        {"model": {"qsparse": {"rules": [{"sparsity": 0.1}]}}},
        {"defaults": 3},
    ],
)
def test_schema_refuses(data):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema())


def test_every_key_is_described():
    def missing(node: Any, path: str) -> list[str]:
        properties = node.get("properties", {})
        found = [f"{path}.{name}" for name, value in properties.items() if not value.get("description")]
        return found + [key for name, value in properties.items() for key in missing(value, f"{path}.{name}")]

    schema = json_schema()
    assert missing(schema, "") == []
    for name, definition in schema["$defs"].items():
        assert definition["description"], name
        assert missing(definition, name) == []


def test_format_recipes_differ_only_in_the_format():
    base = load_config(CONFIGS / "base.yaml")
    for name in ("dense", "qsparse", "bitnet", "qsparse_bitnet", "qsparse_block"):
        config = load_config(CONFIGS / f"{name}.yaml")
        keys = {key for key, _, _ in differences(config, base)} - {"run.name"}
        assert all(key.startswith("model.qsparse.") for key in keys), keys
        assert bool(keys) == (name != "dense")


# Q-Sparse (arXiv 2407.10969) appendix B: hidden, GLU, heads, layers; peak rates of both stages for BitNet b1.58.
PAPER = {
    "gpt_300m": (1024, 2730, 16, 24, 1.8e-3, 1.5e-3),
    "gpt_700m": (1536, 4096, 24, 24, 1.5e-3, 1.0e-3),
    "gpt_1.3b": (2048, 5460, 32, 24, 1.2e-3, 8.0e-4),
    "gpt_7b": (4096, 11008, 32, 32, 1.0e-3, 6.0e-4),
}


@pytest.mark.parametrize("name", PAPER)
def test_gpt_recipes_are_those_of_the_paper(name):
    hidden, glu, heads, layers, lr, stage2_lr = PAPER[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    model, training, optimizer = config.model, config.training, config.optimizer
    assert (model.hidden_size, model.num_attention_heads, model.num_layers) == (hidden, heads, layers)
    assert model.ffn_hidden_size % 64 == 0
    assert abs(model.ffn_hidden_size - glu) <= 32
    assert (optimizer.lr, optimizer.stage2_lr, optimizer.betas, optimizer.warmup_steps) == (
        lr,
        stage2_lr,
        (0.9, 0.95),
        375,
    )
    assert training.global_batch_size * training.seq_length == 2**19
    assert abs(training.steps * 2**19 - 50e9) < 2**19
    assert config.local_world_size == 8
