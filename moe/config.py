"""Mixture-of-experts keys.  No torch here: a login node reads it."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from qsparse_layers.config import StrictModel

EXPERT_TILE = 128
"""Rows and features of a tile of experts in bf16 (`moe.block_sparse`); widths are multiples of it."""


def whole_tiles(width: int) -> int:
    """`width` rounded up to whole tiles."""
    return -(-width // EXPERT_TILE) * EXPERT_TILE


class MoEConfig(StrictModel):
    """Replaces the FFN of the chosen layers by `num_experts` experts, `top_k` of them per token."""

    num_experts: PositiveInt = 8
    """Experts per MoE layer, over all expert-parallel ranks."""
    top_k: PositiveInt = 2
    """Experts that each token visits."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of one expert; absent: `model.ffn_hidden_size`."""
    shared_ffn_hidden_size: PositiveInt | None = None
    """Width of the shared expert, which every token visits in addition; absent: there is none."""
    first_dense_layers: NonNegativeInt = 0
    """Layers at the beginning that keep their dense FFN."""
    layer_frequency: PositiveInt = 1
    """Of the layers after these, every n-th is an MoE layer, beginning with the first (1: all of them)."""
    dispatcher: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """How tokens travel to their experts under expert parallelism; `flex` is DeepEP's (GPU, package deep_ep)."""
    dispatch: Literal["codes", "full"] = "codes"
    """`codes`: where experts quantize their input, tokens are quantized and sparsified before they travel, and int8
    codes travel; `full`: floats travel, and each expert quantizes what it gets.  The results are the same bits."""
    execution: Literal["auto", "sequential", "grouped"] = "auto"
    """`grouped`: one launch for all experts of a rank; `sequential`: one after the other; `auto`: grouped on a GPU."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Router probabilities: softmax over the chosen experts, or sigmoids divided by their sum."""
    balancing: Literal["aux_loss", "seq_aux_loss", "bias", "none"] = "aux_loss"
    """`aux_loss`: load-balancing loss of each microbatch (arXiv 2101.03961 eq. 4); `seq_aux_loss`: of each sequence;
    `bias`: no loss, a bias per expert moves the choice (arXiv 2408.15664), needs scores=sigmoid."""
    aux_loss_coeff: float = Field(1e-2, ge=0.0)
    """Weight of the load-balancing loss."""
    bias_update_rate: PositiveFloat = 1e-3
    """`balancing: bias`: step of every expert's bias after each optimizer step."""
    z_loss_coeff: float = Field(0.0, ge=0.0)
    """Weight of the router z-loss (arXiv 2202.08906 eq. 5)."""
    capacity_factor: PositiveFloat | None = None
    """An expert takes at most this times its even share of a microbatch's tokens and drops those with the smallest
    probabilities; absent: dropless."""

    def is_moe_layer(self, number: int) -> bool:
        """Whether layer `number` (0-based, of the whole model) has experts."""
        after = number - self.first_dense_layers
        return after >= 0 and after % self.layer_frequency == 0

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is larger than num_experts={self.num_experts}")
        if self.balancing == "bias" and self.scores != "sigmoid":
            raise ValueError(f"balancing=bias needs scores=sigmoid, not {self.scores}")
        return self
