"""What a kernel or operator of a training step does, by its name; and what its memory holds."""

import re

COMMUNICATION = "communication"
CATEGORIES = (
    (COMMUNICATION, r"nccl|gloo|c10d::|all_?reduce|allgather|reduce_?scatter"),
    ("optimizer", r"adam|multi_tensor|foreach|optimizer"),
    ("attention", r"attention|attn|flash|fmha|sdpa|mha|rope|rotary"),
    (
        "sparsify, quantize",
        r"sparsif|quantiz|ternar(?!y_(gemv|dot)_)|codes|(row|part)_sums|transpose_|round_gradient|_fused_kernel"
        r"|^(sums|count|fine|keep|local)_kernel$",
    ),
    ("norm, activation", r"norm|^_dots_kernel$|silu|swiglu|geglu|relu|_activation_kernel|dgain|dgamma"),
    (
        "GEMM",
        r"gemm|^_grouped_kernel$|nvjet|cutlass|xmma|wgmma|splitk|::mm$|::addmm$|::bmm$|mkldnn_linear|_hopper_"
        r"|sdd_kernel|sparse_dense_kernel|^ternary_(gemv|dot)_kernel$",
    ),
    ("sort, top-K", r"sort|topk|scatter|histogram"),
)
"""First match wins; what none matches is `elementwise and other`."""
OTHER = "elementwise and other"
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
BUFFERS, ACTIVATIONS = "codes and buffers", "activations"


def category(name: str) -> str:
    """Category of a kernel or operator by its name."""
    return next((label for label, names in CATEGORIES if re.search(names, name, re.IGNORECASE)), OTHER)
