"""Which layer has which format: ordered globs over module paths with global layer numbers, first match wins.

Under pipeline parallelism a rank's `decoder.layers.0` is not the model's; paths here count layers of the whole model,
so that a rule means the same under every layout.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.nn import Module, ModuleList

from kernels.dispatch import Kernels
from qsparse_layers.config import LinearFormat, QSparseConfig, layer_format
from qsparse_layers.linear_call import WeightParts
from qsparse_layers.norm import RMSNorm
from qsparse_layers.parallel import QSparseLinearMixin
from qsparse_layers.schedules import Schedule

_NUMBERED = re.compile(r"\b(layers|local_experts)\.(\d+)")


@dataclass(frozen=True)
class ConfiguredLayer:
    """One linear layer and how it was configured."""

    path: str
    module: QSparseLinearMixin
    format: LinearFormat


def global_paths(model: Module) -> Iterator[tuple[str, Module]]:
    """All modules with their path in the whole model: rank-local layer and expert indices replaced by global ones."""
    first = dict(_first_indices(model))

    def shift(match: re.Match[str]) -> str:
        return f"{match[1]}.{int(match[2]) + first.get(match.string[: match.end(1)], 0)}"

    for path, module in model.named_modules():
        yield _NUMBERED.sub(shift, path), module


def _first_indices(model: Module) -> Iterator[tuple[str, int]]:
    """(path of a list of layers or experts, global number of its first member on this rank)."""
    for path, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) and hasattr(module[0], "layer_number"):
            yield path, int(getattr(module[0], "layer_number")) - 1  # noqa: B009
        if hasattr(module, "local_experts"):
            experts: Any = module
            yield f"{path}.local_experts", experts.ep_group.rank() * experts.num_local_experts


def configure_layers(
    model: Module,
    config: QSparseConfig,
    schedule: Schedule,
    kernels: Kernels,
    *,
    queries_per_group: int,
    head_dim: int,
    gated: bool,
) -> list[ConfiguredLayer]:
    """Give every Q-Sparse linear layer of `model` its format, and the norms their kernels; the layers in model order.

    Args:
        model: one pipeline chunk.
        config: model-wide format, rules and warm-ups.
        schedule: shared by all layers; the trainer moves it.
        kernels: what the layers compute with.
        queries_per_group: query heads per key/value head, for the parts of the fused q/k/v weight.
        head_dim: features of one head.
        gated: whether `linear_fc1` is a fused gate/up weight.
    """
    layers, fused = [], kernels.fused
    for path, module in global_paths(model):
        if isinstance(module, RMSNorm):
            module.fused = fused if fused is not None and fused.takes(len(module.weight), None) else None
        if not isinstance(module, QSparseLinearMixin):
            continue
        layout = layer_format(config, path)
        rows = module.weight.shape[0]
        if path.endswith("linear_qkv"):
            sizes = (queries_per_group * head_dim, head_dim, head_dim)
            parts = WeightParts(rows // sum(sizes), sizes)
        elif path.endswith("linear_fc1") and gated:
            parts = WeightParts(1, (rows // 2, rows // 2))
        else:
            parts = WeightParts(1, (rows,))
        module.configure(layout, parts, schedule, kernels)
        layers.append(ConfiguredLayer(path, module, layout))
    return layers
