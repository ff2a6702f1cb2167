"""Q-Sparse and BitNet b1.58 linear layers on megatron-core's tensor-parallel ones."""
