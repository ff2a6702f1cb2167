"""The Q-Sparse backend for models with experts, and the specification of an MoE layer, on megatron-core 0.16 and later.

0.16 expects a module class and its submodules from `grouped_mlp_modules`, later versions a builder: the number of
positional arguments tells which one asks.  The specification of the layer is a `ModuleSpec` in 0.16 and a partial
function later.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from moe.experts import QSparseSequentialMLP
from moe.layer import QSparseMoELayer
from moe.router import QSparseRouter
from qsparse_layers.spec_provider import QSparseSpecProvider


class QSparseMoESpecProvider(QSparseSpecProvider):
    """Q-Sparse linear layers, also inside experts.

    Args:
        base: what answers for everything else.
        experts: module that runs the local experts.
    """

    def __init__(
        self, base: BackendSpecProvider | None = None, experts: type[QSparseSequentialMLP] = QSparseSequentialMLP
    ) -> None:
        super().__init__(base)
        self._experts = experts

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Experts made of this backend's linear layers."""
        submodules = MLPSubmodules(linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear())
        if len(args) + len(kwargs) > 1:
            return self._experts, submodules
        return partial(self._experts, submodules=submodules)


def moe_spec(provider: QSparseMoESpecProvider, num_experts: int) -> Any:
    """megatron-core's specification of an MoE layer with our layer, router and experts."""
    spec: Any = get_moe_module_spec_for_backend(backend=provider, num_experts=num_experts, moe_grouped_gemm=False)
    if isinstance(spec, ModuleSpec):
        submodules = dataclasses.replace(spec.submodules, router=QSparseRouter)
        # Not a ModuleSpec: the transformer layer warns of one whose module it does not know, once for every layer.
        return SimpleNamespace(module=QSparseMoELayer, submodules=submodules, params={}, metainfo=spec.metainfo)
    submodules = dataclasses.replace(spec.keywords["submodules"], router=QSparseRouter)
    return partial(QSparseMoELayer, submodules=submodules)
