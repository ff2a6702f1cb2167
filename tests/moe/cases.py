"""The small mixture models that the layout tests train, as configuration dictionaries."""

from typing import Any

FULL = {"sparsity": 0.4, "weights": "ternary", "activations": "int8", "sub_norm": True}
NO_SUB_NORM = {**FULL, "sub_norm": False}
DENSE: dict[str, Any] = {}
CLASSIC = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 48, "layer_frequency": 2}
SHARED = {**CLASSIC, "shared_ffn_hidden_size": 32, "z_loss_coeff": 1e-3, "balancing": "seq_aux_loss"}
BIAS = {**CLASSIC, "num_experts": 4, "scores": "sigmoid", "balancing": "bias", "first_dense_layers": 1}
FINE = {"num_experts": 64, "top_k": 8, "ffn_hidden_size": 16, "layer_frequency": 4}
CAPACITY = {**CLASSIC, "capacity_factor": 0.75}


def case(
    qsparse: dict, precision: str, moe: dict | None, parallel: dict | None = None, *, steps: int = 20
) -> dict[str, Any]:
    """A model of four layers with two query heads per key/value head, on text, for `steps` optimizer steps."""
    model = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
    training = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 8, "eval_sequences": 6}
    return {
        "run": {"device": "cpu"},
        "model": {**model, "qsparse": qsparse, "moe": moe},
        "parallel": parallel or {},
        "training": {**training, "steps": steps, "precision": precision},
        "optimizer": {"lr": 3e-3, "stage2_lr": 2e-3, "warmup_steps": 2 if steps > 2 else 0, "clip_grad": 0.0},
    }
