"""megatron-core's column- and row-parallel linear layers, computing `functional.qsparse_linear`.

The one override is `_forward_impl`, the hook through which both of megatron's layers do their product: sharding,
checkpoint keys, bias and the output reduction stay megatron's.

A layer does not know its path in the model, and its format may depend on that: layers are built dense and
`configure` gives each its format afterwards (`rules.configure_layers`).
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from kernels.dispatch import Activation, Expander, Fused, Kernels
from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import qsparse_linear
from qsparse_layers.linear_call import Front, LinearCall, Sharding, TernaryCache, WeightParts
from qsparse_layers.norm import fused_rms_norm, rms_norm
from qsparse_layers.schedules import Schedule
from qsparse_layers.sharded import fused_for
from qsparse_layers.stats import ZeroCounts


class QSparseLinearMixin:
    """What both parallel layers share: a format, the parts of the weight, and counts of zeros."""

    weight: torch.nn.Parameter
    tp_group: torch.distributed.ProcessGroup
    input_size: int
    output_size: int

    format: LinearFormat = LinearFormat()
    parts: WeightParts
    schedule: Schedule
    counts: ZeroCounts

    kernels: Kernels
    cache: TernaryCache
    is_stacked: bool = False
    """Its codes are multiplied out of a stack of several layers', which is kept in bf16, if anything is."""

    def configure(self, layout: LinearFormat, parts: WeightParts, schedule: Schedule, kernels: Kernels) -> None:
        """Give the layer its format; called once, before the optimizer is built."""
        self.format, self.parts, self.schedule, self.kernels = layout, parts, schedule, kernels
        self.counts, self.cache = ZeroCounts(), TernaryCache()

    @property
    def expander(self) -> Expander | None:
        """What brings this layer's ternary codes to bf16 when its weight changes; None: each backward pass does."""
        expander, is_exact = self.kernels.expander, self.format.gradients == "full"
        if expander is None or self.format.weights == "full" or not is_exact or self.is_stacked:
            return None
        return expander if expander.takes(self.weight) else None

    @property
    def _is_megatrons(self) -> bool:
        """A dense layer runs megatron's product, but on GPUs ours, which adds to its float32 gradient as it goes."""
        return self.format.is_dense and self.kernels.fused is None

    def call(self, sharding: Sharding) -> LinearCall:
        """What `qsparse_linear` needs besides tensors, now and with these process groups."""
        return LinearCall(
            format=self.format,
            parts=self.parts,
            sharding=sharding,
            sparsity=self.schedule.sparsity(self.format),
            quantization=self.schedule.quantization,
            counts=self.counts if self.schedule.counting else None,
            kernels=self.kernels,
            cache=self.cache,
            weight_version=self.schedule.weight_version,
            expander=self.expander,
        )


class QSparseColumnParallelLinear(QSparseLinearMixin, ColumnParallelLinear):
    """Y = X W^T with W sharded over output features; the input row is whole, so it is quantized without communication.

    Under sequence parallelism each rank quantizes its own tokens and the all-gather carries int8 codes.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_megatrons:
            return super()._forward_impl(input, weight, *args, **kwargs)
        sharding = Sharding(
            weight=self.tp_group,
            tokens=self.tp_group if kwargs["sequence_parallel"] else None,
            dgrad=self.tp_group if kwargs["allreduce_dgrad"] else None,
        )
        return qsparse_linear(input, weight, self.call(sharding))


class QSparseRowParallelLinear(QSparseLinearMixin, RowParallelLinear):
    """Y = X W^T with X and W sharded over input features: scale and top-K are those of the whole row.

    With `sub_norm` the input passes an RMSNorm over all features first (BitNet's SubLN); its gain is sharded as the
    features are.  Where the kernels can, the norm is computed together with the quantization, and so is the activation
    function of a feed-forward block (`mlp.QSparseMLP`).
    """

    _front: Front | None = None
    """Of the forward pass in progress."""

    def configure(self, layout: LinearFormat, parts: WeightParts, schedule: Schedule, kernels: Kernels) -> None:
        """As the mixin's, and create the SubLN gain if the format has one."""
        super().configure(layout, parts, schedule, kernels)
        if layout.sub_norm:
            gain = torch.nn.Parameter(self.weight.new_ones(self.input_size_per_partition))
            set_tensor_model_parallel_attributes(gain, True, 0, 1)
            # "False" marks expert parameters: their gradients are reduced over the expert data-parallel group.
            setattr(gain, "allreduce", getattr(self.weight, "allreduce"))  # noqa: B009, B010
            self.sub_norm_weight = gain

    def forward(self, input_: Tensor, activation: Activation | None = None) -> tuple[Tensor, Tensor | None]:
        """[..., D / TP] -> [..., O], summed (or reduce-scattered) over the tensor-parallel group.

        Args:
            input_: the features of this rank, or with `activation` what the activation function takes.
            activation: to be computed here; only where `front(activation)` is not None.
        """
        self._front = self.front(activation)
        if self.format.sub_norm and self._front is None:
            input_ = self._sub_norm(input_)
        if self._scatters:
            return self._forward_impl(input_, self.weight), None
        return super().forward(input_)

    @property
    def _scatters(self) -> bool:
        """The sum over ranks is ours, so that gradients in e4m3 come back as such; otherwise it is megatron's."""
        return self.sequence_parallel and not (self.explicit_expert_comm or self._is_megatrons)

    def _sub_norm(self, x: Tensor) -> Tensor:
        eps = self.config.layernorm_epsilon
        if x.dtype == torch.bfloat16 and (fused := self._fused) is not None:
            return fused_rms_norm(x, self.sub_norm_weight, eps, fused)
        return rms_norm(x, self.sub_norm_weight, self.input_size, eps, self.tp_group)

    def front(self, activation: Activation | None) -> Front | None:
        """What this layer can now compute on its input together with the quantization; None: nothing."""
        if self.weight.dtype != torch.bfloat16 or self.format.activations != "int8" or self.schedule.quantization < 1.0:
            return None
        if (activation is None and not self.format.sub_norm) or (fused := self._fused) is None:
            return None
        return Front(fused, activation, self.config.layernorm_epsilon)

    @property
    def _fused(self) -> Fused | None:
        """One-pass kernels for this layer's rows; None: there are none."""
        features = self.input_size_per_partition
        return fused_for(self.kernels, self.format, self.weight.dtype, features, self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_megatrons:
            return super()._forward_impl(input, weight, *args, **kwargs)
        gain = self.sub_norm_weight if self._front and self.format.sub_norm else None
        outputs = self.tp_group if self._scatters else None
        call = self.call(Sharding(weight=self.tp_group, features=self.tp_group, outputs=outputs))
        return qsparse_linear(input, weight, call, self._front, gain)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron's, plus the SubLN gain sharded along its only dimension."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1, "sub_norm_weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
