"""Mixture-of-experts keys.  No torch here: a login node reads it."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from qsparse_layers.config import StrictModel


class MoEConfig(StrictModel):
    """Replaces the FFN of the chosen layers by `num_experts` experts, `top_k` of them per token."""

    num_experts: PositiveInt = 8
    """Experts per MoE layer, over all expert-parallel ranks."""
    top_k: PositiveInt = 2
    """Experts that each token visits."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of one expert; absent: `model.ffn_hidden_size`."""
    layer_frequency: PositiveInt = 1
    """Every n-th layer is an MoE layer (1: all of them)."""
    dispatcher: Literal["allgather", "alltoall"] = "alltoall"
    """How tokens travel to their experts under expert parallelism."""
    aux_loss_coeff: float = Field(1e-2, ge=0.0)
    """Weight of the load-balancing loss; 0 switches balancing off."""
    z_loss_coeff: float = Field(0.0, ge=0.0)
    """Weight of the router z-loss."""

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is larger than num_experts={self.num_experts}")
        return self
