"""Memory of a GPU by category: states, what forward passes save, and what is needed for a moment.

States per parameter, bf16 training: 2 bytes of weight, 4 of gradient, 4 of master weight, 8 of Adam's moments; the
last 12 are shared out over replicas by the distributed optimizer (ZeRO-1, arXiv 1910.02054 sec. 5).  Ternary weights
have one byte more, their int8 codes, and those of grouped experts two (the codes of each and the stack of all);
`run.keep_bf16_weights` adds two to each.  Experts in bf16 have two bytes more, a stack of all.

What a layer saves is counted tensor by tensor, as the autograd functions of `qsparse_layers` and `moe` save it, rather
than by the formula of arXiv 2205.05198 eq. 2, which knows neither codes nor fused passes.  Legend: t tokens of a
microbatch on this rank, D hidden, F features of a projection's input.

Peak memory is that of the fullest pipeline stage at its fullest moment: the loss, or the backward pass of a layer, or
the optimizer.
"""

from moe.config import EXPERT_TILE
from pipeline.config import Config
from pipeline.plan.layout import Layout
from pipeline.plan.model_costs import (
    FeedForward,
    Layer,
    Layers,
    Linear,
    Parameters,
    layer_parameters,
    table_parameters,
)
from pipeline.plan.rates import Rates

GIB = 2**30
BF16 = 2
CATEGORIES = (
    *("weights", "codes, stacks", "gradients", "master weights", "Adam moments"),
    *("activations", "logits, loss", "working set", "CUDA, NCCL"),
)


def memory(config: Config, layout: Layout, layers: Layers, rates: Rates) -> dict[str, float]:
    """Bytes by category on the fullest GPU."""
    saved = [saved_bytes(layer, config, layout) for layer in layers.kinds]
    stages = [_stage(config, layout, layers, stage, saved, rates) for stage in range(layout.pp)]
    return max(stages, key=lambda parts: sum(parts.values()))


def in_torch(parts: dict[str, float]) -> float:
    """Bytes that torch's allocator counts, without what it loses between blocks."""
    return sum(parts.values()) - parts["CUDA, NCCL"]


def stage_parameters(config: Config, layout: Layout, layers: Layers, stage: int) -> Parameters:
    """Parameters of one rank of a pipeline stage; `sharded` and `experts` are this rank's share."""
    hidden, is_last = config.model.hidden_size, stage == layout.pp - 1
    total = Parameters()
    for kind, count in layout.stage(layers.order, stage).items():
        total = total.plus(layer_parameters(layers.kinds[kind], hidden), count)
        total = total.plus(Parameters(stacked_experts=_stacked(layers.kinds[kind].experts, config, layout)), count)
    tables = (stage == 0) + (is_last and not (config.model.tie_embeddings and layout.pp == 1))
    return Parameters(
        sharded=(total.sharded + tables * table_parameters(config)) // layout.tp,
        replicated=total.replicated + (hidden if is_last else 0),
        experts=total.experts // (layout.ep * layout.etp),
        ternary=total.ternary // layout.tp,
        ternary_experts=total.ternary_experts // (layout.ep * layout.etp),
        exact=total.exact // layout.tp,
        exact_experts=total.exact_experts // (layout.ep * layout.etp),
        stacked_experts=total.stacked_experts,
    )


def _stacked(experts: FeedForward | None, config: Config, layout: Layout) -> int:
    """Parameters of a layer in the stacks of one rank's experts in bf16."""
    if experts is None:
        return 0
    branches, count = experts.up.outputs // experts.down.inputs, experts.experts // layout.ep
    return count * (branches + 1) * experts.up.inputs * experts.tile_width(config, layout.etp)


def _stage(
    config: Config, layout: Layout, layers: Layers, stage: int, saved: list[float], rates: Rates
) -> dict[str, float]:
    owned, counts = stage_parameters(config, layout, layers, stage), layout.stage(layers.order, stage)
    states, optimizer_work = _states(config, layout, owned)
    work = max(_layer_work(layers.kinds[kind], layout) for kind in counts)
    kept = sum(saved[kind] * count for kind, count in counts.items())
    if config.training.recompute == "full":
        kept = counts.total() * BF16 * layout.local_tokens * config.model.hidden_size
        work += max(saved[kind] for kind in counts)
    kept = kept * layout.in_flight(stage) + 4.0 * config.training.seq_length * config.model.head_size  # rotary angles
    loss = _loss_bytes(config, layout) if stage == layout.pp - 1 else 0.0
    parts = dict.fromkeys(CATEGORIES, 0.0) | states
    # The loss's buffers are gone when the first layer's backward pass begins.
    busy = {"activations": kept, "logits, loss": loss, "working set": max(0.0, work - loss)}
    idle = {"working set": optimizer_work}
    parts |= busy if sum(busy.values()) > optimizer_work else idle
    outside = rates.context_gib * GIB + (rates.nccl_gib * GIB if layout.gpus > 1 else 0.0)
    parts["CUDA, NCCL"] = outside + rates.fragmentation * sum(parts.values())
    return parts


def _states(config: Config, layout: Layout, owned: Parameters) -> tuple[dict[str, float], float]:
    """Bytes by category, and those that the optimizer's step takes for a moment."""
    dense = owned.sharded + owned.replicated
    shard = float(dense + owned.experts)
    if config.parallel.distributed_optimizer:
        shard = dense / layout.replicas + owned.experts / layout.expert_replicas
    in_bf16 = BF16 * config.run.keep_bf16_weights * (owned.exact + owned.exact_experts)
    states = {
        "weights": BF16 * (dense + owned.experts),
        "codes, stacks": owned.ternary + 2 * owned.ternary_experts + in_bf16 + BF16 * owned.stacked_experts,
        "gradients": 4 * (dense + owned.experts),
        "master weights": 4 * shard,
        "Adam moments": 8 * shard,
    }
    # Without Transformer Engine, Adam works on lists of tensors and makes one of denominators.
    return {name: float(value) for name, value in states.items()}, 0.0 if uses_te(config) else 4.0 * shard


def uses_te(config: Config) -> bool:
    """Attention and Adam are Transformer Engine's: on a GPU, `auto` takes it where it is installed."""
    return config.run.backend != "local"


def saved_bytes(layer: Layer, config: Config, layout: Layout) -> float:
    """Bytes that one layer keeps of one microbatch for its backward pass."""
    model, t, local = config.model, layout.tokens, layout.local_tokens
    heads, groups = model.num_attention_heads / layout.tp, model.query_groups / layout.tp
    norms = 2 * local * (BF16 * model.hidden_size + 4)
    attention = t * BF16 * model.head_size * (2 * heads + 2 * groups) + t * 4 * heads
    if not uses_te(config):  # sines and cosines of each layer's rotations
        attention += 4 * BF16 * config.training.seq_length / layout.cp * model.head_size
    total = norms + attention + _column_input(layer.qkv, local) + _row_input(layer.proj, t, layout.tp, produced=0)
    keeps_up = config.training.recompute != "up_projection"
    for ffn in layer.ffns:
        total += _routed(ffn, config, layout) if ffn.experts else _feed_forward(ffn, layout, keeps_up=keeps_up)
    return total


def _column_input(linear: Linear, tokens: float) -> float:
    """Codes and their scales; the input as it came, or its sparse copy, if it is not quantized."""
    return tokens * (linear.inputs + 4 if linear.is_int8 else BF16 * linear.inputs)


def _row_input(linear: Linear, tokens: float, shards: int, *, produced: int, norm_kernel: bool = True) -> float:
    """What a row-parallel projection saves beside its producer's tensors.

    Args:
        linear: the projection.
        tokens: rows on this rank.
        shards: ranks that share a row.
        produced: bytes per feature of the input, if nobody else keeps it and this layer does not quantize.
        norm_kernel: a norm without quantization, or of a row on several ranks, has a kernel.
    """
    features = linear.inputs / shards
    norm = 0.0
    if linear.format.sub_norm:
        if not norm_kernel and (shards > 1 or not linear.is_int8):
            # torch keeps the norm's input and its result without the reciprocal root, both in float32
            norm = 8 * features + 4
        else:  # its input, if no codes are made of it in the same pass
            norm = 4 + (0 if linear.is_int8 else produced * features)
        produced = BF16
    scale = 4 if linear.is_int8 else 0
    return tokens * (
        norm + scale + features * (1 if linear.is_int8 else produced or BF16 * (linear.format.sparsity > 0))
    )


def _feed_forward(ffn: FeedForward, layout: Layout, *, keeps_up: bool) -> float:
    hidden = layout.tokens * BF16 * ffn.up.outputs / layout.tp * keeps_up
    down = _row_input(ffn.down, layout.tokens, layout.tp, produced=BF16)
    up = _column_input(ffn.up, layout.local_tokens)
    if ffn.is_shared:
        # Its activation function is megatron-core's, whose operators keep twice as much; the router keeps its input.
        hidden, down = 2 * hidden, _row_input(ffn.down, layout.tokens, layout.tp, produced=0)
        up = 0.0 if ffn.up.format.is_dense else up
    return up + hidden + down


def _routed(ffn: FeedForward, config: Config, layout: Layout) -> float:
    """Experts of this rank, under an even load: codes of every copy of a token, and each expert's own tensors."""
    moe = config.model.moe
    assert moe is not None
    hidden, local = config.model.hidden_size, layout.local_tokens
    copies = local * ffn.visits * layout.etp * min(1.0, moe.capacity_factor or 1.0)
    router = local * (BF16 * hidden + 9 * ffn.experts + 24 * ffn.visits)
    weighted = copies * BF16 * hidden
    rows, width = copies, ffn.down.inputs / layout.etp
    if tile_width := ffn.tile_width(config, layout.etp):  # each expert's tokens, too, are padded to whole tiles
        rows, width = copies + ffn.experts / layout.ep * (EXPERT_TILE - 1), tile_width
    sent_as_codes = ffn.up.is_int8 and moe.dispatch == "codes"
    up = rows * (ffn.up.inputs + 4) if sent_as_codes else _column_input(ffn.up, rows)
    branches, down = ffn.up.outputs / ffn.down.inputs, ffn.down._replace(inputs=round(width * layout.etp))
    into_down = _row_input(down, rows, layout.etp, produced=BF16, norm_kernel=False)
    if down.format.sub_norm and down.is_8bit and layout.etp > 1:
        into_down += rows * BF16 * width  # each row's gain
    return router + up + rows * BF16 * branches * width + into_down + weighted


def _layer_work(layer: Layer, layout: Layout) -> float:
    """Largest moment of a layer's backward pass: gradients on both sides of the FFN, operands made for a product."""
    largest = 0.0
    for ffn in layer.ffns:
        shards = layout.etp if ffn.experts else layout.tp
        tokens = layout.local_tokens * ffn.visits * layout.etp if ffn.experts else layout.tokens
        rows = tokens * BF16 * (ffn.up.outputs + 2 * ffn.down.inputs) / shards + 2 * tokens * BF16 * ffn.up.inputs
        weights = BF16 * ffn.up.size * (ffn.experts / layout.ep if ffn.experts else 1) / shards
        largest = max(largest, rows + weights)
    return largest


def _loss_bytes(config: Config, layout: Layout) -> float:
    """Logits and their gradient, the output layer's weight gradient, and its input before and after the last norm.

    Transformer Engine's loss puts the gradient where the logits were; the product behind it needs one more in bf16.
    megatron-core's own works on a float32 copy.
    """
    assert config.model.vocab_size is not None
    vocabulary = config.model.padded_vocab_size(config.model.vocab_size) / layout.tp
    per_logit = 4 if uses_te(config) else 8
    rows = 2 * BF16 * config.model.hidden_size * layout.local_tokens
    return layout.tokens * vocabulary * per_logit + vocabulary * config.model.hidden_size * BF16 + rows
