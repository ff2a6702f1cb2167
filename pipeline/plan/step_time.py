"""Time of an optimizer step by category.

    step = (m + (p - 1) / v) (slowest stage, one microbatch) + once per step        arXiv 2104.04473 sec. 2.2

with m microbatches, p stages, v chunks per stage.  Without a CUDA graph, a microbatch takes at least what Python needs
to launch its kernels.  Communication counts as far as nothing else is known to run beside it.
"""

from collections import Counter

from pipeline.config import Config
from pipeline.plan.layer_time import Costs, layer_time, product
from pipeline.plan.layout import Layout
from pipeline.plan.links import Network, Traffic, layer_traffic, step_traffic
from pipeline.plan.memory import BF16, stage_parameters, uses_te
from pipeline.plan.model_costs import Layer, Layers, Parameters
from pipeline.plan.rates import Rates

CATEGORIES = (
    *("GEMM", "attention", "sparsify, quantize", "norm, activation, other", "loss", "optimizer", "communication"),
    *("pipeline bubble", "launches, host"),
)
_ADAM_TE, _ADAM_LOCAL = 46, 98
"""Bytes per parameter: norm, clip, Adam and the copy to bf16."""
_ZERO_GRADIENT = 4
_CODES, _UNPACKED = 5, 1.25
"""Per ternary weight: codes from bf16; codes from or to 2 bits."""
_LOSS = 12
"""Per logit: the loss forward and backward."""


def step_time(
    config: Config, layout: Layout, layers: Layers, rates: Rates, per_node: int
) -> tuple[dict[str, float], list[Traffic]]:
    """Seconds by category on the slowest pipeline stage, and what one of its GPUs sends."""
    network = Network(rates, per_node)
    kinds = [_layer(layer, config, layout, rates, network) for layer in layers.kinds]
    counts = [layout.stage(layers.order, stage) for stage in range(layout.pp)]
    stages = [_stage(config, layout, layers, stage, counts[stage], kinds, rates) for stage in range(layout.pp)]
    slowest = max(range(layout.pp), key=lambda stage: stages[stage].seconds)
    microbatch = stages[slowest].seconds
    sent = step_traffic(config, layout, layers, slowest, network)
    total = _once(config, layout, stage_parameters(config, layout, layers, slowest), rates)
    total.add(stages[slowest], layout.microbatches)
    total["communication"] += _exposed(sent, microbatch)
    total["pipeline bubble"] = microbatch * (layout.pp - 1) / layout.vpp
    for kind, count in counts[slowest].items():
        sent += [item.times(count * layout.microbatches) for item in kinds[kind][1]]
    return {name: float(total[name]) for name in CATEGORIES}, _merged(sent)


def _merged(messages: list[Traffic]) -> list[Traffic]:
    kinds: dict[str, Traffic] = {}
    for item in messages:
        kinds[item.kind] = kinds[item.kind].plus(item) if item.kind in kinds else item
    return [item for item in kinds.values() if item.sent]


def _stage(
    config: Config,
    layout: Layout,
    layers: Layers,
    stage: int,
    counts: Counter[int],
    kinds: list[tuple[Costs, list[Traffic]]],
    rates: Rates,
) -> Costs:
    """One microbatch, forward and backward."""
    total = Costs()
    for kind, count in counts.items():
        total.add(kinds[kind][0], count)
    if stage == layout.pp - 1:
        total.add(_loss(config, layout, rates))
    if not config.run.cuda_graph:
        host = sum(_host(layers.kinds[kind], rates) * count for kind, count in counts.items())
        host *= 4 / 3 if config.training.recompute == "full" else 1
        total["launches, host"] = max(0.0, host - total.seconds)
    return total


def _host(layer: Layer, rates: Rates) -> float:
    if layer.experts:
        return rates.host_moe_layer
    return rates.host_quantized_layer if layer.has_codes else rates.host_dense_layer


def _layer(layer: Layer, config: Config, layout: Layout, rates: Rates, network: Network) -> tuple[Costs, list[Traffic]]:
    costs, messages = layer_time(layer, config, layout, rates), layer_traffic(layer, config, layout, network)
    # Inputs are gathered beside the input gradients, and those reduced beside the weights': two thirds of the products.
    beside = sum(item.seconds for item in messages if item.hidden_by)
    exposed = sum(item.seconds for item in messages if not item.hidden_by)
    costs["communication"] = exposed + max(0.0, beside - costs["GEMM"] * 2 / 3)
    return costs, messages


def _loss(config: Config, layout: Layout, rates: Rates) -> Costs:
    """Output layer and cross entropy of one microbatch; the embedding's own work is small."""
    assert config.model.vocab_size is not None
    t, hidden = layout.tokens, config.model.hidden_size
    vocabulary = config.model.padded_vocab_size(config.model.vocab_size) / layout.tp
    moved = BF16 * (t * (hidden + vocabulary) + hidden * vocabulary)
    gemm = product(rates, rates.gemm_bf16, t, vocabulary, hidden, moved)
    gemm += product(rates, rates.gemm_bf16, t, hidden, vocabulary, moved)
    gemm += product(rates, rates.gemm_bf16, vocabulary, hidden, t, moved)
    passes = t * vocabulary * _LOSS * (1 if uses_te(config) else 2) + 12 * vocabulary * hidden
    return Costs({"GEMM": gemm, "loss": passes / rates.bandwidth})


def _once(config: Config, layout: Layout, owned: Parameters, rates: Rates) -> Costs:
    """Optimizer and ternary codes of the new weights."""
    dense, per_parameter = owned.sharded + owned.replicated, _ADAM_TE if uses_te(config) else _ADAM_LOCAL
    shard = float(dense + owned.experts)
    if config.parallel.distributed_optimizer:
        shard = dense / layout.replicas + owned.experts / layout.expert_replicas
    moved = per_parameter * shard + _ZERO_GRADIENT * (dense + owned.experts)
    costs = Costs({"optimizer": moved / rates.bandwidth, "launches, host": rates.step_overhead})
    # The mean is read first, then the weight again; stacks of experts are copies.
    codes: float = _CODES * owned.ternary + (_CODES + 2) * owned.ternary_experts
    if config.parallel.ternary_param_gather:  # made and packed by whoever has updated the weight, unpacked by all
        codes = _UNPACKED * owned.ternary + (_UNPACKED + 2) * owned.ternary_experts
        made = owned.ternary / layout.replicas + owned.ternary_experts / layout.expert_replicas
        codes += (_CODES + _UNPACKED) * made
    if config.run.keep_bf16_weights:  # written beside the codes, or read again from the stack
        codes += 2 * owned.exact + 3 * owned.exact_experts
    costs["sparsify, quantize"] = (codes + 2 * BF16 * owned.stacked_experts) / rates.bandwidth
    return costs


def _exposed(sent: list[Traffic], microbatch: float) -> float:
    """Seconds of data and pipeline parallelism that one microbatch's passes do not hide."""
    room = {"backward": microbatch * 2 / 3, "forward": microbatch / 3, "": 0.0}
    return sum(max(0.0, item.seconds - room[item.hidden_by]) for item in sent)
