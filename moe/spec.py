"""The Q-Sparse backend for models with experts, on megatron-core 0.16 and later.

0.16 expects a module class and its submodules from `grouped_mlp_modules`, later versions a builder: the number of
positional arguments tells which one asks.
"""

from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules

from moe.experts import QSparseSequentialMLP
from qsparse_layers.spec_provider import QSparseSpecProvider


class QSparseMoESpecProvider(QSparseSpecProvider):
    """Q-Sparse linear layers, also inside experts."""

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Sequential experts made of this backend's linear layers."""
        submodules = MLPSubmodules(linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear())
        if len(args) + len(kwargs) > 1:
            return QSparseSequentialMLP, submodules
        return partial(QSparseSequentialMLP, submodules=submodules)
