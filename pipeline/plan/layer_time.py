"""Kernel time of one layer and microbatch: products at the rate of their format, everything else by its bytes.

A product takes its operations over the measured rate, stretched by what its tiles leave idle of the multiprocessors in
the last wave, or its bytes over the bandwidth.  Bytes of other passes are those that `kernels/` read and write, per
token and feature.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

from pipeline.config import Config
from pipeline.plan.layout import Layout
from pipeline.plan.memory import BF16
from pipeline.plan.model_costs import FeedForward, Layer, Linear
from pipeline.plan.rates import Rates

_TILE, _MULTIPROCESSORS = 128, 132
_NORMS, _RESIDUALS = 2 * (4 + 6), 2 * (6 + 6)
"""Bytes per token and hidden feature, two of each, forward and backward."""
_ROTARY = 12
"""Per token and feature of q, k and v: rotation or copy out of the fused product, its backward, concatenation."""
_ROUTED = 30
"""Per copy of a token and feature: permute, sort, weight and sum, and back."""
_SHARDED_TOPK = 1 + 2
"""Codes of a row that several ranks share: counted again, and masked in place (`kernels.sharded`)."""
_UNQUANTIZED_SELECTION = 10
"""Top-K without codes (`kernels.topk_float`): a read and a write, and counting that memory waits for."""
_NORM = 4, 6
"""SubLN without quantization."""


class Costs(defaultdict[str, float]):
    """Seconds by category."""

    def __init__(self, given: Mapping[str, float] | None = None) -> None:
        super().__init__(float, given or {})

    def add(self, other: Mapping[str, float], times: float = 1.0) -> None:
        """Add `times` times `other`."""
        for name, value in other.items():
            self[name] += times * value

    @property
    def seconds(self) -> float:
        """All categories together."""
        return sum(self.values())


def product(rates: Rates, rate: float, m: float, n: float, k: float, bytes_moved: float) -> float:
    """Seconds of an [m, k] by [k, n] product at `rate` operations per second with full multiprocessors."""
    waves = math.ceil(math.ceil(m / _TILE) * math.ceil(n / _TILE) / _MULTIPROCESSORS)
    full = m * n / (_TILE * _TILE * _MULTIPROCESSORS)
    return max(2 * m * n * k / rate * waves / full, bytes_moved / rates.bandwidth)


def layer_time(layer: Layer, config: Config, layout: Layout, rates: Rates) -> Costs:
    """Forward, backward and recomputation of one layer and microbatch, without communication."""
    return _LayerTime(layer, config, layout, rates).total()


class _LayerTime:
    def __init__(self, layer: Layer, config: Config, layout: Layout, rates: Rates) -> None:
        self._layer, self._config, self._layout, self._rates = layer, config, layout, rates
        self._forward, self._backward = Costs(), Costs()

    def total(self) -> Costs:
        """All of it."""
        layer, t, tp, recompute = self._layer, self._layout.tokens, self._layout.tp, self._config.training.recompute
        self._attention()
        self._products(layer.qkv, t, (1, tp))
        self._products(layer.proj, t, (tp, 1))
        self._front(layer.qkv, self._layout.local_tokens, 1)
        self._front(layer.proj, t, tp)
        for ffn in layer.ffns:
            self._feed_forward(ffn)
        if recompute == "full":
            self._backward.add(self._forward)
        elif recompute == "selective":
            self._backward["attention"] += self._forward["attention"]
        self._backward.add(self._forward)
        return self._backward

    def _attention(self) -> None:
        model, layout, rates = self._config.model, self._layout, self._rates
        keys = self._config.training.seq_length / 2  # causal
        operations = 4 * layout.tokens * keys * model.num_attention_heads * model.head_size / layout.tp
        self._forward["attention"] = operations / rates.attention_forward
        self._backward["attention"] = 2.5 * operations / rates.attention_backward
        plain = layout.local_tokens * model.hidden_size * (_NORMS + _RESIDUALS)
        self._plain(plain + layout.tokens * self._layer.qkv.outputs / layout.tp * _ROTARY)

    def _feed_forward(self, ffn: FeedForward) -> None:
        layout, branches = self._layout, ffn.up.outputs // ffn.down.inputs
        shards, tokens, experts = layout.tp, float(layout.tokens), 0
        if ffn.experts:
            shards, experts = layout.etp, ffn.experts // layout.ep
            tokens = layout.local_tokens * ffn.visits * layout.etp
            self._plain(_ROUTED * layout.local_tokens * ffn.visits * ffn.up.inputs)
        in_tiles = ffn.tile_width(self._config, shards) > 0
        self._products(ffn.up, tokens, (1, shards), experts, in_tiles=in_tiles)
        self._products(ffn.down, tokens, (shards, 1), experts, in_tiles=in_tiles)
        self._front(ffn.up, layout.local_tokens, 1)
        self._front(ffn.down, tokens, shards, branches)
        if self._config.training.recompute == "up_projection":
            self._products(ffn.up, tokens, (1, shards), again=True)

    def _plain(self, moved: float) -> None:
        """Kernels that move bytes, two parts of five in the forward pass."""
        for costs, share in ((self._forward, 0.4), (self._backward, 0.6)):
            costs["norm, activation, other"] += share * moved / self._rates.bandwidth

    def _products(
        self,
        linear: Linear,
        t: float,
        shards: tuple[int, int],
        experts: int = 0,
        *,
        again: bool = False,
        in_tiles: bool = False,
    ) -> None:
        """Products of a projection whose (inputs, outputs) `shards` ranks share; `again`: the forward's only."""
        inputs, outputs = linear.inputs / shards[0], linear.outputs / shards[1]
        weights, rows = inputs * outputs * (experts or 1), BF16 * t * (inputs + outputs)
        in_forward, for_dx, for_dw = _product_rates(linear, self._rates, is_routed=experts > 0)
        grouped = experts if linear.is_8bit or in_tiles else 0  # one launch for all of them
        count, per_expert = (1 if grouped else experts or 1), t / (experts or 1)
        m, moved = (t if grouped else per_expert), (rows + BF16 * weights) / count
        once = count * product(self._rates, in_forward, m, outputs, inputs, moved)
        if again:
            self._backward["GEMM"] += once
            return
        self._forward["GEMM"] += once
        self._backward["GEMM"] += count * product(self._rates, for_dx, m, inputs, outputs, moved)
        moved = (rows + 8 * weights) / count  # dW is added to float32: read and written
        dw = product(self._rates, for_dw, outputs, inputs * (grouped or 1), per_expert, moved)
        self._backward["GEMM"] += count * dw
        made = 0.0 if self._config.run.keep_bf16_weights and linear.is_exact else weights
        passes = _operand_bytes(linear, t * inputs, t * outputs, made)
        if in_tiles:  # tokens are brought to rows of tiles and back, twice; dW is written before it is added
            passes += 4 * BF16 * t * inputs + 2 * BF16 * weights
        self._backward["sparsify, quantize"] += passes / self._rates.bandwidth

    def _front(self, linear: Linear, t: float, shards: int, branches: int = 0) -> None:
        """What stands in front of a product: activation of `branches` inputs (0: none), SubLN, codes, top-K."""
        form, has_norm = linear.format, linear.format.sub_norm
        plain = back = codes = 0
        reads = 2 * max(1, branches)
        if linear.is_int8:  # one pass each; the norm or the scale of a shared row takes a second one
            codes = reads + 1 if shards == 1 else 2 * reads + 1
            back = 2 * reads + 2 if has_norm or branches else 0
            back += (reads + 2) * (shards > 1 and has_norm)
            codes += _SHARDED_TOPK * (shards > 1 and form.sparsity > 0 and form.pattern == "topk")
        else:
            if branches:
                plain, back = 2 * branches + 2, 4 * branches + 2
            if has_norm:
                again = 2 * (shards > 1), 4 * (shards > 1)
                plain, back = plain + _NORM[0] + again[0], back + _NORM[1] + again[1]
            if form.sparsity:
                codes = _UNQUANTIZED_SELECTION
        seconds = t * linear.inputs / shards / self._rates.bandwidth
        self._forward["norm, activation, other"] += plain * seconds
        self._forward["sparsify, quantize"] += codes * seconds * self._rates.sparsify_slowdown
        self._backward["norm, activation, other"] += back * seconds


def _product_rates(linear: Linear, rates: Rates, *, is_routed: bool) -> tuple[float, float, float]:
    """Forward, dX and dW."""
    if not linear.is_8bit:
        return rates.gemm_bf16, rates.gemm_bf16, rates.gemm_bf16
    is_fast = linear.format.gradients == "e4m3"
    if not is_routed:
        backward = rates.gemm_e4m3 if is_fast else rates.gemm_bf16
        return rates.gemm_int8, backward, backward
    if is_fast:
        return rates.grouped_8bit, rates.grouped_8bit, rates.grouped_8bit_wgrad
    return rates.grouped_8bit, rates.grouped_bf16, rates.grouped_bf16_wgrad


def _operand_bytes(linear: Linear, inputs: float, outputs: float, weights: float) -> float:
    """Moved to make the operands of the backward products: 8-bit and transposed, or bf16 from codes."""
    if linear.format.gradients == "e4m3":
        return 5 * outputs + 2 * inputs + 2 * weights
    return 3 * inputs * linear.is_int8 + 3 * weights * linear.is_ternary
