"""Shapes and variants of `qsparse bench train`; no torch here."""

from typing import Any, Literal, NamedTuple

from pipeline.config import Config

WORKER = "pipeline.bench.train_worker"
NAIVE = {"sub_norm": True}
BITNET = {"weights": "ternary", "activations": "int8", "sub_norm": True}
FAST: dict[str, Any] = {"sparsity": 0.5, "gradients": "e4m3", **BITNET}


class Variant(NamedTuple):
    """One way to train a shape."""

    summary: str
    qsparse: dict[str, Any]
    engine: Literal["ours", "fake", "fake-compiled", "te-bf16", "te-fp8"] = "ours"
    """`fake`: `train_naive`; `-compiled`: torch.compile around each layer; `te-...`: Transformer Engine's model."""
    sparsity: float = 0.0
    """Of `fake`."""
    package: str = ""
    """What has to be installed."""
    cuda_graph: bool = True
    """Whether to try `run.cuda_graph` first; what cannot be captured is measured without."""
    recompute: str = "none"
    """`training.recompute`."""
    offloads: bool = False
    """`training.offload_layers` of half the layers; not as a graph."""
    experts: int = 0
    """Each of half the feed-forward width, two per token: as many activated parameters as the dense model has."""


VARIANTS = {
    "dense": Variant("bf16, no sparsity, no quantization", {}),
    "te-bf16": Variant(
        "dense, Transformer Engine's layers in bf16", {}, engine="te-bf16", package="transformer_engine"
    ),
    "te-fp8": Variant(
        "dense, Transformer Engine's FP8 layers (hybrid, delayed scaling)",
        {},
        engine="te-fp8",
        package="transformer_engine",
    ),
    "bitnet": Variant("ternary weights, 8-bit activations", BITNET),
    "qsparse-bitnet": Variant("top-K 50%, ternary weights, 8-bit activations", {"sparsity": 0.5, **BITNET}),
    "qsparse-bitnet-fast": Variant("the same with gradients=e4m3", FAST),
    "qsparse-bitnet-lean": Variant(
        "fast, and training.recompute=up_projection: less memory",
        FAST,
        recompute="up_projection",
    ),
    "qsparse-bitnet-offload": Variant(
        "fast, and training.offload_layers: activations of half the layers wait in the host's memory",
        FAST,
        package="transformer_engine",
        cuda_graph=False,
        offloads=True,
    ),
    "qsparse-bitnet-moe": Variant(
        "fast, 8 experts of half the width, 2 per token",
        FAST,
        experts=8,
    ),
    "dense-moe": Variant("bf16, 8 experts of half the width, 2 per token", {}, experts=8),
    "block": Variant(
        "16:32 with gradients=e4m3",
        {"pattern": "block", "block_size": 32, **FAST},
    ),
    "qsparse": Variant("top-K 50%, weights and activations in bf16", {"sparsity": 0.5}),
    "naive-bitnet": Variant("the usual BitNet training code, fake quantization in bf16", NAIVE, engine="fake"),
    "naive-bitnet-compiled": Variant("the same, each transformer layer compiled", NAIVE, engine="fake-compiled"),
    "naive": Variant("the usual code with top-K 50%", NAIVE, engine="fake", sparsity=0.5),
    "naive-compiled": Variant("the same, each transformer layer compiled", NAIVE, engine="fake-compiled", sparsity=0.5),
}


class Shape(NamedTuple):
    """A model; the papers' recipes in `configs/` have the same."""

    model: dict[str, int]
    seq_length: int
    micro_batch_size: int
    """That fits every variant into 80 GB; doubled where that fits and for as long as it makes a variant faster."""
    vocab_size: int


SHAPES = {
    "tiny": Shape(
        {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4}, 32, 2, vocab_size=256
    ),
    "350m": Shape(
        {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 2752, "num_attention_heads": 16},
        2048,
        8,
        vocab_size=32000,
    ),
    "1.3b": Shape(
        {"num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 5440, "num_attention_heads": 32},
        2048,
        4,
        vocab_size=32000,
    ),
}


def layout_name(dp: int, tp: int) -> str:
    """`DP=2 TP=4`, without sizes of 1."""
    return " ".join(f"{name}={size}" for name, size in (("DP", dp), ("TP", tp)) if size > 1) or "one GPU"


class Order(NamedTuple):
    """What one process of the benchmark is asked to measure; travels as JSON."""

    shape: str
    variant: str
    device: str
    micro_batch_size: int
    microbatches: int
    steps: int
    warmup_steps: int
    data: str | None
    cuda_graph: bool = False
    dp: int = 1
    tp: int = 1

    @property
    def gpus(self) -> int:
        """Processes."""
        return self.dp * self.tp

    @property
    def name(self) -> str:
        """Shape, variant and, on several GPUs, layout."""
        return f"{self.shape} {self.variant}" + (f", {layout_name(self.dp, self.tp)}" if self.gpus > 1 else "")

    def config(self) -> Config:
        """The run that is measured."""
        shape, variant = SHAPES[self.shape], VARIANTS[self.variant]
        model: dict[str, Any] = {**shape.model, "vocab_size": shape.vocab_size, "qsparse": variant.qsparse}
        if variant.experts:
            width = shape.model["ffn_hidden_size"] // 2
            model["moe"] = {"num_experts": variant.experts, "top_k": 2, "ffn_hidden_size": width}
        return Config.model_validate(
            {
                "run": {"device": self.device, "cuda_graph": self.cuda_graph},
                "model": model,
                "parallel": {
                    "dp": self.dp,
                    "tp": self.tp,
                    "sequence_parallel": self.tp > 1,
                    "distributed_optimizer": self.dp > 1,
                    "overlap_grad_reduce": self.dp > 1,
                },
                "training": {
                    "steps": self.warmup_steps + self.steps + 1,
                    "micro_batch_size": self.micro_batch_size,
                    "global_batch_size": self.micro_batch_size * self.microbatches * self.dp,
                    "seq_length": shape.seq_length,
                    "precision": "bf16",
                    "recompute": variant.recompute,
                    "offload_layers": shape.model["num_layers"] // 2 if variant.offloads else 0,
                    "eval_interval": 0,
                },
                "optimizer": {"warmup_steps": 0, "schedule": "constant", "lr": 3e-4},
                "tracking": {"mlflow": False},
            }
        )
