"""The whole model once more in plain PyTorch, for comparison: RoPE, GQA, SubLN, three activations, detach-style STE.

Run under torchrun with one process.  It compares loss and every gradient of megatron-core's model with ours, in fp64,
for several configurations, and writes {case: largest relative difference} as JSON.  What it proves beyond the layer's
own test: which rows of the fused weights are q, k, v, gate and up, where norms sit, and how it is wired.
"""

import json
import math
import os
import sys
from pathlib import Path

from pipeline.cpu_backend import install

if __name__ == "__main__":
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pipeline.config import Config, ModelConfig
from pipeline.learner import Learner
from pipeline.model import unwrap
from pipeline.world import current_world, initialize_layout
from tests.distributed.test_layouts import BLOCK, DENSE, FULL, case
from tests.testing import TextWindows

Weights = dict[str, Tensor]


def straight_through(value: Tensor, target: Tensor) -> Tensor:
    return value + (target - value).detach()


def float32(value: Tensor) -> Tensor:
    return value.to(torch.float32).double()  # scales are float32 numbers


def sparse_input(x: Tensor, model: ModelConfig) -> Tensor:
    layout, scale, codes = model.qsparse, torch.ones(()), x
    if layout.activations == "int8":
        scale = float32(x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127)
        codes = torch.clamp(torch.round(x / scale), -128, 127)
    if layout.sparsity:
        width = x.shape[-1] if layout.pattern == "topk" else layout.block_size
        blocks = codes.abs().unflatten(-1, (-1, width))
        keep = int((1 - layout.sparsity) * width)
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(blocks).scatter(-1, order[..., :keep], 1.0).flatten(-2)
        codes = codes * mask
    return straight_through(x, codes * scale)


def ternary(w: Tensor, model: ModelConfig) -> Tensor:
    if model.qsparse.weights == "full":
        return w
    scale = float32(w.abs().mean().clamp(min=1e-5))
    return straight_through(w, scale * torch.clamp(torch.round(w / scale), -1, 1))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding over halves of [b, s, heads, d]; angles in float32, as megatron-core has them."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies)
    cos, sin = (f(torch.cat([angles, angles], -1)).double()[:, None] for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention(x: Tensor, w: Weights, prefix: str, model: ModelConfig) -> Tensor:
    groups, queries, d = model.query_groups, model.num_attention_heads // model.query_groups, model.head_size
    fused = w[f"{prefix}.linear_qkv.weight"].unflatten(0, (groups, (queries + 2) * d))
    x = sparse_input(x, model)
    rows = {"q": slice(0, queries * d), "k": slice(queries * d, (queries + 1) * d), "v": slice((queries + 1) * d, None)}
    heads = {n: (x @ ternary(fused[:, r].flatten(0, 1), model).T).unflatten(-1, (-1, d)) for n, r in rows.items()}
    q, k = rotate(heads["q"], model.rope_theta), rotate(heads["k"], model.rope_theta)
    k, v = k.repeat_interleave(queries, 2), heads["v"].repeat_interleave(queries, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(causal, -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2)
    return row_parallel(out, w, f"{prefix}.linear_proj", model)


def row_parallel(x: Tensor, w: Weights, prefix: str, model: ModelConfig) -> Tensor:
    if model.qsparse.sub_norm:
        x = rms_norm(x, w[f"{prefix}.sub_norm_weight"])
    return sparse_input(x, model) @ ternary(w[f"{prefix}.weight"], model).T


def feed_forward(x: Tensor, w: Weights, prefix: str, model: ModelConfig) -> Tensor:
    x, fused = sparse_input(x, model), w[f"{prefix}.linear_fc1.weight"]
    if model.activation == "relu2":
        return row_parallel(torch.relu(x @ ternary(fused, model).T) ** 2, w, f"{prefix}.linear_fc2", model)
    gate, up = (x @ ternary(half, model).T for half in fused.chunk(2))
    activated = torch.relu(gate) ** 2 if model.activation == "relu2_glu" else gate * torch.sigmoid(gate)
    return row_parallel(activated * up, w, f"{prefix}.linear_fc2", model)


def loss(tokens: Tensor, w: Weights, model: ModelConfig) -> Tensor:
    """Mean cross-entropy of [b, s + 1] token ids."""
    table = w["embedding.word_embeddings.weight"]
    x = table[tokens[:, :-1]]
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}"
        x = x + attention(rms_norm(x, w[f"{prefix}.input_layernorm.weight"]), w, f"{prefix}.self_attention", model)
        x = x + feed_forward(rms_norm(x, w[f"{prefix}.pre_mlp_layernorm.weight"]), w, f"{prefix}.mlp", model)
    logits = rms_norm(x, w["decoder.final_layernorm.weight"]) @ w.get("output_layer.weight", table).T
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def largest_difference(config: Config) -> float:
    """Largest relative difference of the loss and of every gradient (in norm) between both models."""
    initialize_layout(config)
    data = TextWindows(config.training.seq_length)
    learner = Learner(config, current_world(config), data, vocab_size=256)
    model = unwrap(learner.chunks[0])
    for parameter in model.parameters():  # unit gains would hide a norm in the wrong place
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.from_numpy(data.windows([0, 1, 2, 3])).unsqueeze(0)
    (found,) = learner.engine.train(tokens, 1)
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = loss(tokens[0], w, config.model)
    expected.backward()
    differences = [(found.mean() - expected).abs() / expected]
    for name, parameter in model.named_parameters():
        gradient = w[name].grad
        assert gradient is not None and gradient.norm() > 0, name
        differences.append((parameter.main_grad - gradient).norm() / gradient.norm())
    parallel_state.destroy_model_parallel()
    return float(max(differences))


def cases() -> dict[str, Config]:
    """Formats, activations, grouped queries and tied embeddings."""
    plain = {"dense": DENSE, "qsparse": {"sparsity": 0.4}, "bitnet": {**FULL, "sparsity": 0.0}, "full": FULL}
    configs = {name: case(qsparse, "fp64", {}) for name, qsparse in {**plain, "block": BLOCK}.items()}
    for name, model in {
        "swiglu": {"activation": "swiglu"},
        "relu2": {"activation": "relu2"},
        "tied": {"tie_embeddings": True},
        "multi-head": {"num_query_groups": 4},
    }.items():
        values = case(FULL, "fp64", {})
        configs[name] = {**values, "model": {**values["model"], **model}}
    return {name: Config(**values) for name, values in configs.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group("gloo")
    results = {name: largest_difference(config) for name, config in cases().items()}
    Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()
