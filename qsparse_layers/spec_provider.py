"""megatron-core's extension point: a backend that answers with our layers and leaves the rest to another backend.

Norms are our RMSNorm and never fused into the following linear layer, because the norm has to come before the
quantizer.  Attention is torch's SDPA, or Transformer Engine's where that is the wrapped backend.
"""

from typing import Any

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from qsparse_layers.attention import SDPACoreAttention
from qsparse_layers.norm import RMSNorm
from qsparse_layers.parallel import QSparseColumnParallelLinear, QSparseRowParallelLinear


class QSparseSpecProvider(BackendSpecProvider):
    """Q-Sparse linear layers on top of `base` (megatron-core's local backend unless told otherwise)."""

    def __init__(self, base: BackendSpecProvider | None = None) -> None:
        self.base = base or LocalSpecProvider()

    def column_parallel_linear(self) -> type:
        """The column-parallel linear layer."""
        return QSparseColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """The row-parallel linear layer."""
        return QSparseRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Never: the quantizer sits between norm and product."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """There is no fused layer."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """RMSNorm, whatever is asked for: the model has no other norm."""
        return RMSNorm

    def core_attention(self) -> type:
        """SDPA over the local backend, otherwise the wrapped backend's attention."""
        return SDPACoreAttention if isinstance(self.base, LocalSpecProvider) else self.base.core_attention()

    def activation_func(self) -> Any:
        """The wrapped backend's fused activation, if any."""
        return self.base.activation_func()

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Experts are built by `moe.spec`, which knows their layers."""
        return self.base.grouped_mlp_modules(*args, **kwargs)
