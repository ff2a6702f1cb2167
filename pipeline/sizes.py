"""Parameters and operations of a model from its configuration alone; no torch here.

Sparsity counts projections only, as the paper does (arXiv 2407.10969 sec. 4.2): embeddings and output layer are not
part of N.  A token visits k of E experts, so of N only N_active = attention + dense FFNs + shared experts + k / E of
the experts take part, and sparsity S, weighted by these, leaves N_active (1 - S) activated parameters.  Operations are
those of the dense model, so that MFU compares sparse and dense runs by the same yardstick.
"""

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.plan.model_costs import total_parameters

BF16_PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12, "A800": 312e12}
"""Dense bf16 tensor-core peaks from the vendors' data sheets (SXM), by the name that the driver reports."""


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of the whole model."""

    projections: int
    """Linear layers of attention and FFN, all experts included."""
    active_projections: int
    """Those that one token visits: top-k of the experts."""
    embeddings: int
    """Embedding table and, if untied, output layer; padding included."""
    other: int
    """Norm gains and routers."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.projections + self.embeddings + self.other


def model_size(config: Config, vocab_size: int) -> ModelSize:
    """Count the parameters of the model of `config` for a tokenizer of `vocab_size` ids."""
    known = config.model.model_copy(update={"vocab_size": config.model.vocab_size or vocab_size})
    projections, active = _projections(config)
    embeddings = (1 if known.tie_embeddings else 2) * _table(config, vocab_size)
    others = total_parameters(config.model_copy(update={"model": known})) - projections - embeddings
    return ModelSize(projections, active, embeddings, others)


def _projections(config: Config) -> tuple[int, int]:
    """Weights of all linear layers, and of those that one token visits."""
    model = config.model
    hidden = model.hidden_size
    attention = hidden * model.head_size * (2 * model.num_attention_heads + 2 * model.query_groups)
    branches = 2 if model.activation == "relu2" else 3
    dense = branches * hidden * model.ffn_hidden_size
    moe_layers = sum(model.moe is not None and model.moe.is_moe_layer(number) for number in range(model.num_layers))
    expert = branches * hidden * ((model.moe.ffn_hidden_size if model.moe else None) or model.ffn_hidden_size)
    num_experts, top_k = (model.moe.num_experts, model.moe.top_k) if model.moe else (0, 0)
    shared = branches * hidden * ((model.moe.shared_ffn_hidden_size if model.moe else None) or 0)
    common = model.num_layers * attention + (model.num_layers - moe_layers) * dense + moe_layers * shared
    return common + moe_layers * num_experts * expert, common + moe_layers * top_k * expert


def _table(config: Config, vocab_size: int) -> int:
    return config.model.padded_vocab_size(config.model.vocab_size or vocab_size) * config.model.hidden_size


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Operations of forward and backward per token, dense: 6 N + 12 L d s (arXiv 2204.02311 app. B)."""
    model = config.model
    width = model.num_attention_heads * model.head_size
    attention = 12 * model.num_layers * width * config.training.seq_length
    return 6 * (_projections(config)[1] + _table(config, vocab_size)) + attention


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None if unknown."""
    return next((peak for name, peak in BF16_PEAK_FLOPS.items() if name in device_name), None)
