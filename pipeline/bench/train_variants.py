"""Shapes and variants of `qsparse bench train`; no torch here."""

from typing import Any, Literal, NamedTuple

from pipeline.config import Config

WORKER = "pipeline.bench.train_worker"
BITNET = {"weights": "ternary", "activations": "int8", "sub_norm": True}


class Variant(NamedTuple):
    """One way to train a shape."""

    summary: str
    qsparse: dict[str, Any]
    kernels: str = "auto"
    engine: Literal["ours", "compiled", "te-bf16", "te-fp8"] = "ours"
    """`compiled`: with torch.compile around each transformer layer; `te-...`: Transformer Engine's model."""
    package: str = ""
    """What has to be installed."""
    cuda_graph: bool = True
    """Whether to try `run.cuda_graph` first; what cannot be captured is measured without."""


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
    "qsparse-bitnet-fast": Variant("the same with gradients=e4m3", {"sparsity": 0.5, "gradients": "e4m3", **BITNET}),
    "block": Variant(
        "16:32 with gradients=e4m3",
        {"sparsity": 0.5, "pattern": "block", "block_size": 32, "gradients": "e4m3", **BITNET},
    ),
    "qsparse": Variant("top-K 50%, weights and activations in bf16", {"sparsity": 0.5}),
    "naive": Variant(
        "as qsparse-bitnet, on run.kernels=reference: plain PyTorch", {"sparsity": 0.5, **BITNET}, kernels="reference"
    ),
    "naive-compiled": Variant(
        "naive, each transformer layer compiled by torch.compile",
        {"sparsity": 0.5, **BITNET},
        kernels="reference",
        engine="compiled",
        cuda_graph=False,
    ),
}


class Shape(NamedTuple):
    """A model; the papers' recipes in `configs/` have the same."""

    model: dict[str, int]
    seq_length: int
    micro_batch_size: int
    """That fits every variant into 80 GB; twice of it is tried where half of the memory was enough."""
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


class Order(NamedTuple):
    """What one process of the benchmark is asked to measure; travels as JSON."""

    shape: str
    variant: str
    device: str
    gpus: int
    micro_batch_size: int
    microbatches: int
    steps: int
    warmup_steps: int
    data: str | None
    cuda_graph: bool = False

    def config(self) -> Config:
        """The run that is measured."""
        shape, variant = SHAPES[self.shape], VARIANTS[self.variant]
        return Config.model_validate(
            {
                "run": {"device": self.device, "kernels": variant.kernels, "cuda_graph": self.cuda_graph},
                "model": {**shape.model, "vocab_size": shape.vocab_size, "qsparse": variant.qsparse},
                "parallel": {
                    "dp": self.gpus,
                    "distributed_optimizer": self.gpus > 1,
                    "overlap_grad_reduce": self.gpus > 1,
                },
                "training": {
                    "steps": self.warmup_steps + self.steps + 1,
                    "micro_batch_size": self.micro_batch_size,
                    "global_batch_size": self.micro_batch_size * self.microbatches * self.gpus,
                    "seq_length": shape.seq_length,
                    "precision": "bf16",
                    "eval_interval": 0,
                },
                "optimizer": {"warmup_steps": 0, "schedule": "constant", "lr": 3e-4},
                "tracking": {"mlflow": False},
            }
        )
