"""Layers of a model as matrices with formats, and how many parameters they have.

Formats follow `model.qsparse` and its rules, layer by layer; experts of one layer count as the first one.
Activated parameters are N_active (1 - S): the k / E experts that a token visits, and of every projection the share of
inputs that top-K keeps (arXiv 2407.10969 sec. 4.2).  Zeros that an activation function makes by itself are not known
beforehand, so S is the configured one, not the measured one.
"""

from typing import NamedTuple

from moe.config import whole_tiles
from pipeline.config import Config
from qsparse_layers.config import LinearFormat, layer_format


class Linear(NamedTuple):
    """One projection, over all ranks."""

    inputs: int
    outputs: int
    format: LinearFormat

    @property
    def size(self) -> int:
        """Parameters of the matrix."""
        return self.inputs * self.outputs

    @property
    def is_int8(self) -> bool:
        """Inputs are int8 codes."""
        return self.format.activations == "int8"

    @property
    def is_ternary(self) -> bool:
        """The weight is ternary codes."""
        return self.format.weights == "ternary"

    @property
    def is_exact(self) -> bool:
        """Ternary codes whose backward pass multiplies bf16 gradients."""
        return self.is_ternary and self.format.gradients == "full"

    @property
    def is_8bit(self) -> bool:
        """Forward product of codes by ternary codes."""
        return self.is_int8 and self.is_ternary

    @property
    def activated(self) -> float:
        """Parameters that nonzero inputs meet."""
        return self.size * (1 - self.format.sparsity)


class FeedForward(NamedTuple):
    """An FFN, a shared expert, or the experts of a layer."""

    up: Linear
    down: Linear
    experts: int = 0
    """Copies of it, of which each token visits `visits`; 0: an ordinary FFN."""
    visits: int = 1
    is_shared: bool = False
    """A shared expert."""

    def tile_width(self, config: Config, shards: int) -> int:
        """Width on one of `shards` ranks, in whole tiles, of experts in bf16 that run as such; 0: others."""
        run, moe = config.run, config.model.moe
        if moe is None or moe.execution == "sequential" or run.kernels == "reference" or not self.experts:
            return 0
        in_bf16 = config.training.precision == "bf16" and self.up.format.is_plain and self.down.format.is_plain
        return whole_tiles(self.down.inputs // shards) if in_bf16 else 0


class Layer(NamedTuple):
    """A transformer layer."""

    qkv: Linear
    proj: Linear
    ffns: tuple[FeedForward, ...]

    @property
    def linears(self) -> list[tuple[Linear, int]]:
        """(projection, how often a token meets it)."""
        inner = [(linear, ffn.visits) for ffn in self.ffns for linear in (ffn.up, ffn.down)]
        return [(self.qkv, 1), (self.proj, 1), *inner]

    @property
    def experts(self) -> FeedForward | None:
        """The experts, if it has any."""
        return next((ffn for ffn in self.ffns if ffn.experts), None)

    @property
    def has_codes(self) -> bool:
        """Some projection is quantized."""
        return any(not linear.format.is_dense for linear, _ in self.linears)


class Parameters(NamedTuple):
    """Parameters of some layers: those that tensor parallelism shares out, those that every rank holds, experts."""

    sharded: int = 0
    replicated: int = 0
    experts: int = 0
    ternary: int = 0
    """Of `sharded`, those with ternary codes."""
    ternary_experts: int = 0
    exact: int = 0
    """Of `ternary`, those with an exact backward pass, which `run.keep_bf16_weights` serves."""
    exact_experts: int = 0
    stacked_experts: int = 0
    """In the stacks that experts in bf16 run from."""

    def plus(self, other: "Parameters", count: int = 1) -> "Parameters":
        """The sum with `count` times `other`."""
        return Parameters(*(a + count * b for a, b in zip(self, other, strict=True)))


class Layers(NamedTuple):
    """All layers of a model."""

    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    """Kind of each layer, first to last."""


def model_layers(config: Config) -> Layers:
    """The layers of `config`, which no layout changes."""
    kinds: dict[Layer, int] = {}
    order = [kinds.setdefault(_layer(config, number), len(kinds)) for number in range(config.model.num_layers)]
    return Layers(tuple(kinds), tuple(order))


def _layer(config: Config, number: int) -> Layer:
    model, path = config.model, f"decoder.layers.{number}"
    hidden, width, moe = model.hidden_size, model.num_attention_heads * model.head_size, model.moe
    branches = 1 if model.activation == "relu2" else 2

    def linear(name: str, inputs: int, outputs: int) -> Linear:
        return Linear(inputs, outputs, layer_format(model.qsparse, f"{path}.{name}"))

    def ffn(name: str, features: int, *, experts: int = 0, visits: int = 1) -> FeedForward:
        up = linear(f"{name}.linear_fc1", hidden, branches * features)
        return FeedForward(up, linear(f"{name}.linear_fc2", features, hidden), experts, visits)

    if moe is None or not moe.is_moe_layer(number):
        ffns = [ffn("mlp", model.ffn_hidden_size)]
    else:
        features = moe.ffn_hidden_size or model.ffn_hidden_size
        ffns = [ffn("mlp.experts.local_experts.0", features, experts=moe.num_experts, visits=moe.top_k)]
        if moe.shared_ffn_hidden_size:
            ffns.append(ffn("mlp.shared_experts", moe.shared_ffn_hidden_size)._replace(is_shared=True))
    qkv = linear("self_attention.linear_qkv", hidden, width + 2 * model.query_groups * model.head_size)
    return Layer(qkv, linear("self_attention.linear_proj", width, hidden), tuple(ffns))


def layer_parameters(layer: Layer, hidden: int) -> Parameters:
    """Of one layer."""
    total = Parameters(replicated=2 * hidden)
    pairs = [(layer.proj, 0), *((ffn.down, ffn.experts) for ffn in layer.ffns)]
    gains = sum(linear.inputs for linear, experts in pairs if linear.format.sub_norm and not experts)
    total = total.plus(Parameters(sharded=gains))
    for linear in (layer.qkv, layer.proj, *(part for ffn in layer.ffns if not ffn.experts for part in ffn[:2])):
        ternary, exact = linear.size * linear.is_ternary, linear.size * linear.is_exact
        total = total.plus(Parameters(sharded=linear.size, ternary=ternary, exact=exact))
    if (experts := layer.experts) is not None:
        gains = experts.down.inputs if experts.down.format.sub_norm else 0
        size, count = experts.up.size + experts.down.size, experts.experts
        routed = Parameters(
            experts=count * (size + gains),
            ternary_experts=count * sum(part.size * part.is_ternary for part in experts[:2]),
            exact_experts=count * sum(part.size * part.is_exact for part in experts[:2]),
            replicated=count * hidden,
        )
        total = total.plus(routed)
    return total


def table_parameters(config: Config) -> int:
    """Of one embedding table; `model.vocab_size` must be set."""
    assert config.model.vocab_size is not None
    return config.model.padded_vocab_size(config.model.vocab_size) * config.model.hidden_size


def total_parameters(config: Config) -> int:
    """Of the whole model, embeddings included."""
    layers = model_layers(config)
    parts = [layer_parameters(layer, config.model.hidden_size) for layer in layers.kinds]
    layers_size = sum(parts[kind].sharded + parts[kind].replicated + parts[kind].experts for kind in layers.order)
    tables = 1 if config.model.tie_embeddings else 2
    return layers_size + config.model.hidden_size + tables * table_parameters(config)


def activated_parameters(config: Config) -> float:
    """N_active (1 - S); projections only, as the paper counts."""
    layers = model_layers(config)
    per_kind = [sum(linear.activated * visits for linear, visits in layer.linears) for layer in layers.kinds]
    return sum(per_kind[kind] for kind in layers.order)
