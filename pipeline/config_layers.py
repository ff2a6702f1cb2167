"""The linear layers that a configuration describes, by path, and whether `model.qsparse` fits them.

Paths are those of the rules' globs: global 0-based layer numbers, the same under every layout,

    decoder.layers.3.self_attention.linear_qkv | linear_proj
    decoder.layers.3.mlp.linear_fc1 | linear_fc2                               (dense FFN)
    decoder.layers.3.mlp.experts.local_experts.5.linear_fc1 | linear_fc2       (expert 5 of an MoE layer)
    decoder.layers.3.mlp.shared_experts.linear_fc1 | linear_fc2                (its shared expert)

They are listed from the configuration alone, so that a glob with a typo or a block size that does not divide a row is
an error on the login node and not on the cluster.  The price is that this list and the model builder must agree.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from qsparse_layers.config import LayerRule, LinearFormat, apply_rule, layer_format, matching_rule

if TYPE_CHECKING:
    from pipeline.config import ModelConfig, ParallelConfig

Finding = tuple[tuple[str, ...], str]
"""Dotted keys involved, and the message."""


class LinearLayer(NamedTuple):
    """One linear layer of the model and the input rows that it sees."""

    path: str
    """Path that rules match."""
    num_features: int
    """Features of an input row, over all ranks."""
    width_key: str
    """Key that sets `num_features`."""
    shards: int
    """Ranks that share the features of a row (row-parallel layers), 1 for column-parallel layers."""
    shards_key: str
    """Key that sets `shards`."""


def linear_layers(model: "ModelConfig", parallel: "ParallelConfig") -> Iterator[LinearLayer]:
    """All layers that `model.qsparse` governs, first to last; embedding, router and output layer are always dense."""
    attention_key = "model.hidden_size" if model.head_dim is None else "model.head_dim"
    attention_width = model.num_attention_heads * model.head_size
    for number in range(model.num_layers):
        attention = f"decoder.layers.{number}.self_attention"
        yield LinearLayer(f"{attention}.linear_qkv", model.hidden_size, "model.hidden_size", 1, "")
        yield LinearLayer(f"{attention}.linear_proj", attention_width, attention_key, parallel.tp, "parallel.tp")
        yield from _ffn_layers(model, parallel, number)


def _ffn_layers(model: "ModelConfig", parallel: "ParallelConfig", number: int) -> Iterator[LinearLayer]:
    mlps = [f"decoder.layers.{number}.mlp"]
    moe = model.moe
    width, width_key = model.ffn_hidden_size, "model.ffn_hidden_size"
    shards, shards_key = parallel.tp, "parallel.tp"
    if moe is not None and moe.is_moe_layer(number):
        if moe.shared_ffn_hidden_size is not None:
            shared, shared_key = f"{mlps[0]}.shared_experts", "model.moe.shared_ffn_hidden_size"
            yield LinearLayer(f"{shared}.linear_fc1", model.hidden_size, "model.hidden_size", 1, "")
            yield LinearLayer(f"{shared}.linear_fc2", moe.shared_ffn_hidden_size, shared_key, shards, shards_key)
        mlps = [f"{mlps[0]}.experts.local_experts.{expert}" for expert in range(moe.num_experts)]
        if moe.ffn_hidden_size is not None:
            width, width_key = moe.ffn_hidden_size, "model.moe.ffn_hidden_size"
        if parallel.etp is not None:
            shards, shards_key = parallel.etp, "parallel.etp"
    for mlp in mlps:
        yield LinearLayer(f"{mlp}.linear_fc1", model.hidden_size, "model.hidden_size", 1, "")
        yield LinearLayer(f"{mlp}.linear_fc2", width, width_key, shards, shards_key)


def layer_formats(model: "ModelConfig", parallel: "ParallelConfig") -> dict[str, LinearFormat]:
    """Format of every layer of `linear_layers`, by path, after the rules."""
    return {layer.path: layer_format(model.qsparse, layer.path) for layer in linear_layers(model, parallel)}


def check_layer_rules(model: "ModelConfig", parallel: "ParallelConfig") -> Iterator[Finding]:
    """Yield rules without effect and block sizes that do not divide the rows they apply to."""
    rules = model.qsparse.rules
    groups: dict[int | None, list[LinearLayer]] = {}
    for layer in linear_layers(model, parallel):
        groups.setdefault(matching_rule(rules, layer.path), []).append(layer)
    for i, rule in enumerate(rules):
        if i not in groups:
            yield _rule_without_effect(model, parallel, i, rule)
    for index, layers in groups.items():
        yield from _indivisible_rows(model, layers, index)


def _rule_without_effect(model: "ModelConfig", parallel: "ParallelConfig", index: int, rule: LayerRule) -> Finding:
    layers = list(linear_layers(model, parallel))
    key = f"model.qsparse.rules.{index}"
    name = f"model.qsparse.rules[{index}].match={rule.match!r}"
    if any(fnmatchcase(layer.path, rule.match) for layer in layers):
        return (key,), f"{name} has no effect: earlier rules match all its layers, and the first match wins"
    examples = ", ".join(layer.path for layer in layers[:4])
    return (key,), f"{name} matches no layer; layers 0 to {model.num_layers - 1} look like {examples}"


def _indivisible_rows(model: "ModelConfig", layers: list[LinearLayer], index: int | None) -> Iterator[Finding]:
    """Findings for `layers`, which share the format of rule `index`; one per width, not one per layer."""
    layout = apply_rule(model.qsparse, None if index is None else model.qsparse.rules[index])
    if layout.sparsity == 0.0 or layout.pattern != "block":
        return
    by_rule = index is not None and model.qsparse.rules[index].block_size is not None
    block_name = f"model.qsparse.rules[{index}].block_size" if by_rule else "model.qsparse.block_size"
    block_key = f"model.qsparse.rules.{index}.block_size" if by_rule else "model.qsparse.block_size"
    seen: set[tuple[str, int]] = set()
    for layer in layers:
        # A width that the ranks cannot share at all is another rule's finding.
        shared, row = layer.num_features % layer.shards, layer.num_features // layer.shards
        if shared or row % layout.block_size == 0 or (layer.width_key, layer.shards) in seen:
            continue
        seen.add((layer.width_key, layer.shards))
        where = f"{row} features" + (f" on each of {layer.shards_key}={layer.shards} ranks" if layer.shards > 1 else "")
        message = f"{block_name}={layout.block_size} does not divide the input of {layer.path}: {where}"
        origin = f"{layer.num_features} in all, from {layer.width_key}"
        yield tuple(filter(None, (block_key, layer.width_key, layer.shards_key))), f"{message} ({origin})"
