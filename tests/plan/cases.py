"""Small models whose layers are measured and estimated."""

from typing import Any

BITNET = {"weights": "ternary", "activations": "int8", "sub_norm": True}
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 96, "shared_ffn_hidden_size": 64, "execution": "sequential"}


def case(qsparse: dict[str, Any], *, tp: int = 1, sequence_parallel: bool = False, **model: Any) -> dict[str, Any]:
    """A configuration for two processes."""
    shape = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4, "vocab_size": 256}
    return {
        "run": {"device": "cpu", "backend": "local"},
        "model": {**shape, "qsparse": qsparse, **model},
        "parallel": {"tp": tp, "dp": 2 // tp, "sequence_parallel": sequence_parallel},
        "training": {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 8, "precision": "bf16"},
    }


CASES = {
    "dense": case({}),
    "dense, grouped queries, one branch": case({}, num_query_groups=2, activation="relu2"),
    "bitnet": case(BITNET),
    "qsparse bitnet": case({"sparsity": 0.5, **BITNET}),
    "quantized without SubLN": case({"sparsity": 0.5, **BITNET, "sub_norm": False}),
    "sparse, not quantized": case({"sparsity": 0.5}),
    "SubLN, not quantized": case({"sparsity": 0.5, "sub_norm": True}),
    "SubLN, not quantized, tp": case({"sparsity": 0.5, "sub_norm": True}, tp=2),
    "dense, tp": case({}, tp=2),
    "dense, tp and sequence": case({}, tp=2, sequence_parallel=True),
    "qsparse bitnet, tp": case({"sparsity": 0.5, **BITNET}, tp=2),
    "qsparse bitnet, tp and sequence": case({"sparsity": 0.5, **BITNET}, tp=2, sequence_parallel=True),
    "mixture": case({"sparsity": 0.5, **BITNET}, moe=MOE),
    "mixture, dense": case({}, moe=MOE),
}
