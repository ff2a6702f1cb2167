"""MoE layers of one shape: ours, and megatron-core's router and dispatcher around other libraries' bf16 experts.

All share weights and float32 gradient buffers.  The rivals get our one-pass activation and weighting, so that what
differs is what is compared: quantization, top-K and SubLN on our side, the grouped products on both.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.dispatcher import ExpertInput
from moe.front import weigh
from pipeline.bench.moe_worker import Shape
from pipeline.config import Config
from pipeline.model import build_model, unwrap
from qsparse_layers.mlp import activate

FULL = {"sparsity": 0.5, "weights": "ternary", "activations": "int8", "sub_norm": True}
EXACT, FAST, DENSE, FLOATS = "ours exact", "ours e4m3", "ours dense", "ours exact, floats travel"
TORCH, TORCH_ADDS, ENGINE = "torch._grouped_mm", "torch._grouped_mm, dW added", "TE GroupedLinear"


def build(shape: Shape, name: str, device: str, num_processes: int, first: Any = None) -> Any:
    """The MoE layer called `name`, with the weights of `first` if that is given.

    Raises:
        ImportError: its library is not installed.
    """
    model = build_model(configuration(shape, name, device, num_processes), vocab_size=256)
    layer: Any = unwrap(model.chunks[0]).decoder.layers[0].mlp
    model.schedule.weights_changed()  # from here on ternary codes are kept, as between the microbatches of a step
    layer.train()
    shared = dict((first or layer).named_parameters())
    for path, parameter in layer.named_parameters():
        parameter.data = shared[path].data
        parameter.main_grad = getattr(shared[path], "main_grad", None)
        if parameter.main_grad is None and parameter.is_cuda:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    if name in RIVALS:
        layer.experts = RivalExperts(layer, RIVALS[name])
    return layer


def configuration(shape: Shape, name: str, device: str, num_processes: int) -> Config:
    """A model of one such layer."""
    qsparse = {} if name in (DENSE, *RIVALS) else FULL | ({"gradients": "e4m3"} if name == FAST else {})
    model = {
        "num_layers": 1,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.hidden_size // 64,
        "qsparse": qsparse,
        "moe": {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "balancing": "none",
            "execution": "grouped",
            "dispatch": "full" if name == FLOATS else "codes",
        },
    }
    return Config.model_validate(
        {
            "run": {"device": device},
            "model": model,
            "parallel": {"ep": num_processes},
            "training": {"steps": 100, "micro_batch_size": 1, "global_batch_size": num_processes, "precision": "bf16"},
        }
    )


class RivalExperts(torch.nn.Module):
    """bf16 experts of another library, in place of those of `layer`."""

    def __init__(self, layer: Any, products: Callable[[list[Tensor]], Callable[[Tensor, Tensor], Tensor]]) -> None:
        super().__init__()
        experts = layer.experts.local_experts
        self._config, self._fused = layer.config, experts[0].linear_fc2.kernels.fused
        self._up = products([expert.linear_fc1.weight for expert in experts])
        self._down = products([expert.linear_fc2.weight for expert in experts])

    def forward(
        self, tokens: ExpertInput, tokens_per_expert: Tensor, probs: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `moe.experts.QSparseSequentialMLP.forward`."""
        hidden = activate(self._up(tokens.x, tokens_per_expert), self._config, self._fused)
        return weigh(self._down(hidden, tokens_per_expert), probs, self._fused), None


class _TorchProduct(torch.nn.Module):
    """PyTorch's grouped product of one stacked weight.

    Its gradient is returned in bf16; with `adds` it is added to a float32 buffer, as a training step needs it and all
    others do.
    """

    def __init__(self, weights: Sequence[Tensor], *, adds: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.stack([weight.detach() for weight in weights]))
        if adds:
            self._main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
            self.weight.register_hook(self._add)

    def _add(self, grad: Tensor) -> None:
        self._main_grad += grad

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        ends = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)
        return torch._grouped_mm(x, self.weight.transpose(1, 2), offs=ends)


class _EngineProduct(torch.nn.Module):
    """Transformer Engine's grouped linear layer, which adds its weight gradients to the float32 buffers."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        from transformer_engine.pytorch import GroupedLinear

        num_outputs, num_inputs = weights[0].shape
        self.layer = GroupedLinear(
            len(weights), num_inputs, num_outputs, bias=False, params_dtype=torch.bfloat16,
            device=weights[0].device, fuse_wgrad_accumulation=True,
        )  # fmt: skip
        for number, weight in enumerate(weights):
            mine = getattr(self.layer, f"weight{number}")
            mine.data, mine.main_grad = weight.data, getattr(weight, "main_grad", None)

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        return self.layer(x, tokens_per_expert.tolist())  # its counts live on the host


RIVALS: dict[str, Callable[[list[Tensor]], Callable[[Tensor, Tensor], Tensor]]] = {
    TORCH: _TorchProduct,
    TORCH_ADDS: partial(_TorchProduct, adds=True),
    ENGINE: _EngineProduct,
}
