"""What one GPU sends in a step, by kind, and how long it takes.

Bytes sent by one rank of n in ring algorithms (of a tensor of S bytes, whole): all-gather and reduce-scatter
S (n-1)/n, all-reduce twice that; all-to-all of S bytes held by the rank: S (n-1)/n.  Tensor and sequence parallelism
communicate as in arXiv 2205.05198 sec. 4.2, the distributed optimizer as ZeRO-1 (arXiv 1910.02054 sec. 7).

A group inside a node runs at the bus bandwidth of NVLink.  Across nodes, every member of the group in a node has a
network card of its own, so its ring gets `network` times these members, at most NVLink's.  Groups are laid over nodes
in megatron-core's order of ranks.  Contention between groups is not modelled.
"""

import math
from dataclasses import dataclass, replace

from pipeline.config import Config
from pipeline.plan.layout import Layout
from pipeline.plan.memory import BF16, stage_parameters
from pipeline.plan.model_costs import FeedForward, Layer, Layers, Linear
from pipeline.plan.rates import Rates

ROW_ALIGNMENT = 16
_SUMS_BYTES, _COUNTS_BYTES, _DOTS_BYTES = 8, (32, 16), 4
"""Per token and rank of a row that ranks share (`qsparse_layers.sharded`)."""
_AMOUNTS = ("sent", "in_bf16", "with_2bit", "seconds")


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind that one GPU sends."""

    kind: str
    sent: float
    """Bytes per step, as the code sends them."""
    in_bf16: float
    """If activations travelled in bf16."""
    with_2bit: float
    """With `parallel.ternary_param_gather`, as the code sends them."""
    seconds: float
    hidden_by: str = ""
    """What it can run beside: `products` of a layer's backward pass, `backward`, `forward`, or nothing."""
    forward: float = 0.0
    """Share of a layer's that belongs to its forward pass, which full recomputation repeats."""

    def times(self, count: float) -> "Traffic":
        """`count` times as much."""
        return replace(self, **{name: getattr(self, name) * count for name in _AMOUNTS})

    def plus(self, other: "Traffic") -> "Traffic":
        """Both together, of this one's kind."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _AMOUNTS})


class Network:
    """Times of collectives.

    Args:
        rates: of the GPUs.
        per_node: GPUs of a node.
    """

    def __init__(self, rates: Rates, per_node: int) -> None:
        self._rates, self._per_node = rates, per_node

    def collective(self, sent: float, size: int, stride: int) -> float:
        """Seconds to send `sent` bytes per rank in a group of `size` ranks, `stride` apart."""
        if size == 1 or not sent:
            return 0.0
        if size * stride <= self._per_node:
            return sent / self._rates.nvlink + self._rates.latency_node
        members = max(1, self._per_node // stride)
        return sent / min(self._rates.nvlink, members * self._rates.network) + self._latency(size, members)

    def _latency(self, size: int, members: int) -> float:
        return self._rates.latency_network * math.ceil(size / members)

    def all_to_all(self, sent: float, size: int, stride: int) -> float:
        """As `collective`; what leaves the node goes through each GPU's own card."""
        if size == 1 or not sent:
            return 0.0
        members = min(size, max(1, self._per_node // stride))
        if members == size:
            return sent / self._rates.nvlink + self._rates.latency_node
        outside = sent * (size - members) / (size - 1)
        return max((sent - outside) / self._rates.nvlink, outside / self._rates.network) + self._latency(size, members)


def row_bytes(features: int) -> int:
    """A token on its way to an expert as codes (`moe.wire`)."""
    return -(-(features + 4) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def layer_traffic(layer: Layer, config: Config, layout: Layout, network: Network) -> list[Traffic]:
    """Of one layer and microbatch, forward and backward."""
    found = [*_columns(layer.qkv, layout, network), *_rows(layer.proj, layout, network)]
    for ffn in layer.ffns:
        if ffn.experts:
            found += _experts(ffn, config, layout, network)
        else:
            found += [*_columns(ffn.up, layout, network), *_rows(ffn.down, layout, network)]
    if layout.cp > 1:  # keys and values go round the ring, and their gradients with them
        keys = 2 * config.model.query_groups * config.model.head_size / layout.tp
        sent = 3 * layout.tokens * keys * BF16 * (layout.cp - 1)
        seconds = network.collective(sent, layout.cp, layout.tp)
        found.append(Traffic("context: keys, values", sent, sent, sent, seconds, forward=1 / 3))
    repeats = config.training.recompute == "full"
    return [item.times(1 + item.forward * repeats) for item in found]


def _tp(
    kind: str,
    sizes: tuple[float, float],
    layout: Layout,
    network: Network,
    *,
    times: int = 1,
    hidden_by: str = "",
    forward: float = 0.0,
) -> Traffic:
    """`times` gathers or scatters of tensors of `sizes`: bytes as sent, bytes in bf16."""
    whole, bf16 = (size * (layout.tp - 1) / layout.tp for size in sizes)
    seconds = network.collective(whole, layout.tp, 1)
    return Traffic(kind, whole, bf16, whole, seconds, hidden_by, forward).times(times)


def _columns(linear: Linear, layout: Layout, network: Network) -> list[Traffic]:
    """Input gathered for the product, and again beside the input gradient, which is reduced beside the weight's."""
    if layout.tp == 1:
        return []
    rows, beside = float(layout.tokens * linear.inputs * BF16), "products"
    if not layout.sequence_parallel:
        return [_tp("tensor: reductions", (rows, rows), layout, network, times=2, hidden_by=beside)]
    codes = layout.tokens * (linear.inputs + 4) if linear.is_int8 else rows
    return [
        _tp("tensor: gathers of inputs", (codes, rows), layout, network, forward=1),
        _tp("tensor: gathers of inputs", (codes, rows), layout, network, hidden_by=beside),
        _tp("tensor: reductions", (rows, rows), layout, network, hidden_by=beside),
    ]


def _rows(linear: Linear, layout: Layout, network: Network) -> list[Traffic]:
    """Output reduced (its gradient gathered, with sequence parallelism); scales and top-K of rows on several ranks."""
    if layout.tp == 1:
        return []
    outputs, times = float(layout.tokens * linear.outputs * BF16), 1 if layout.sequence_parallel else 2
    found = [_tp("tensor: reductions", (outputs, outputs), layout, network, times=times, forward=1)]
    if layout.sequence_parallel:
        rounded = layout.tokens * (linear.outputs + 4) if linear.format.gradients == "e4m3" else outputs
        found.append(_tp("tensor: gathers of gradients", (rounded, outputs), layout, network))
    form = linear.format
    counted = linear.is_int8 and form.sparsity and form.pattern == "topk" and form.topk_scope == "global"
    gathered = (_SUMS_BYTES, *_COUNTS_BYTES) if counted else (_SUMS_BYTES,)
    if linear.is_int8 or form.sub_norm:
        for per_rank in gathered:
            size = float(layout.tokens * per_rank * layout.tp)
            found.append(_tp("tensor: scales, top-K counts", (size, size), layout, network, forward=1))
    if form.sub_norm:  # summed in the backward pass
        size = 2.0 * layout.tokens * _DOTS_BYTES
        found.append(_tp("tensor: scales, top-K counts", (size, size), layout, network))
    return found


def _experts(ffn: FeedForward, config: Config, layout: Layout, network: Network) -> list[Traffic]:
    """Dispatch (codes or bf16) and combine forward; backward both ways in bf16.  An even load is assumed."""
    moe, size = config.model.moe, layout.ep * layout.etp
    assert moe is not None
    if size == 1:
        return []
    copies = layout.local_tokens * ffn.visits * (size - 1) / size
    bf16 = copies * BF16 * ffn.up.inputs
    codes = copies * row_bytes(ffn.up.inputs) if ffn.up.is_int8 and moe.dispatch == "codes" else bf16

    times = {count: network.all_to_all(count, size, 1) for count in (codes, bf16)}
    dispatch = Traffic("experts: dispatch", codes, bf16, codes, times[codes], forward=1)
    back = Traffic("experts: outputs, gradients", bf16, bf16, bf16, times[bf16], forward=1 / 3)
    return [dispatch, back.times(3)]


def step_traffic(config: Config, layout: Layout, layers: Layers, stage: int, network: Network) -> list[Traffic]:
    """Once per step: gradients and parameters of one pipeline rank; between stages, all microbatches."""
    owned, parallel = stage_parameters(config, layout, layers, stage), config.parallel
    stride = 1 if layout.cp > 1 else layout.tp
    dense = owned.sharded + owned.replicated, owned.ternary, layout.replicas, stride
    experts = owned.experts, owned.ternary_experts, layout.expert_replicas, layout.ep * layout.etp
    gradients = Traffic("data: gradients, fp32", 0, 0, 0, 0, "backward" if parallel.overlap_grad_reduce else "")
    weights = Traffic("data: parameters", 0, 0, 0, 0, "forward" if parallel.overlap_param_gather else "")
    for count, ternary, size, step in (dense, experts):
        share = (size - 1) / size
        reduced = 4 * count * share * (1 if parallel.distributed_optimizer else 2)
        seconds = network.collective(reduced, size, step)
        gradients = gradients.plus(Traffic("", reduced, reduced, reduced, seconds))
        if parallel.distributed_optimizer:
            weights = weights.plus(_parameters(count, ternary, size, step, config, network))
    found = [gradients, weights]
    if layout.pp > 1:
        rows = layout.local_tokens * config.model.hidden_size * BF16
        seconds = network.collective(rows, 2, layout.tp * layout.cp * layout.dp)
        count = 2 * layout.microbatches * layout.vpp
        found.append(Traffic("pipeline: activations", rows, rows, rows, seconds).times(count))
    return found


def _parameters(count: int, ternary: int, size: int, step: int, config: Config, network: Network) -> Traffic:
    """The gather after an optimizer step.  With 2-bit codes, the rank that holds most of the others deals them out."""
    share = (size - 1) / size
    in_bf16, codes = BF16 * count * share, ternary / 4 * share
    others, dealt = BF16 * (count - ternary) * share, BF16 * min(count - ternary, count / size) * share
    small = codes + others + dealt
    if not config.parallel.ternary_param_gather:
        return Traffic("", in_bf16, in_bf16, small, network.collective(in_bf16, size, step))
    seconds = sum(network.collective(part, size, step) for part in (codes, others))
    return Traffic("", small, in_bf16, small, seconds + network.all_to_all(dealt, size, step))
