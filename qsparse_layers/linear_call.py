"""What one call of `functional.qsparse_linear` is made of besides tensors with gradients.

The format, the parts of the weight, the process groups and the kernels stay the same for a layer's life (`LinearCall`);
the codes of its weight stay for an optimizer step (`TernaryCache`), and with them, if the layer has an expander, the
bf16 copy that exact backward passes multiply by.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import Activation, Before, Expanded, Expander, Fused, Kernels, Packed, ReferenceKernels
from qsparse_layers.config import LinearFormat
from qsparse_layers.stats import ZeroCounts


@dataclass(frozen=True)
class WeightParts:
    """How the rows of a fused weight belong to its parts: `groups` repetitions of `sizes` consecutive rows.

    Megatron's q/k/v weight is `groups=query groups, sizes=(queries, key, value)`, its gate/up weight is
    `groups=1, sizes=(ffn, ffn)`, an ordinary matrix `groups=1, sizes=(O,)`.
    """

    groups: int
    sizes: tuple[int, ...]

    def split(self, weight_OD: Tensor) -> tuple[Tensor, ...]:
        """Views [groups, size, D] of the parts."""
        return weight_OD.unflatten(0, (self.groups, sum(self.sizes))).split(self.sizes, dim=1)

    def expand(self, value_per_part: Tensor) -> Tensor:
        """[parts] -> [O], each row with its part's value."""
        sizes = torch.tensor(self.sizes, device=value_per_part.device)
        return value_per_part.repeat_interleave(sizes, output_size=sum(self.sizes)).repeat(self.groups)


@dataclass(frozen=True)
class Sharding:
    """Process groups of one parallel linear layer; None stands for a group of one."""

    weight: dist.ProcessGroup | None = None
    """Ranks that hold shards of the weight: the ternary scale is a mean over all of them."""
    features: dist.ProcessGroup | None = None
    """Ranks that hold shards of the input's features (row parallel): scale and top-K are global."""
    tokens: dist.ProcessGroup | None = None
    """Ranks that hold shards of the sequence (sequence parallel): codes are gathered over them."""
    outputs: dist.ProcessGroup | None = None
    """Ranks over which the product is summed, each keeping its tokens (row parallel with sequence parallel)."""
    dgrad: dist.ProcessGroup | None = None
    """Ranks whose input gradients are summed (column parallel without sequence parallel)."""


@dataclass(frozen=True)
class Front:
    """What precedes quantization and is computed with it in one pass: an activation function, an RMSNorm, or both."""

    fused: Fused
    activation: Activation | None
    eps: float
    """Of the norm, which there is if a gain is given."""

    def before(self, gain: Tensor | None) -> Before:
        """The same with the norm's gain."""
        return Before(self.activation, gain, self.eps)


@dataclass(frozen=True)
class Codes:
    """A quantized and sparsified input: int8 values [T, D] and float32 scales [T, 1]."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Operand:
    """values * scale, values being int8 codes or floats; `scale` None stands for 1."""

    values: Tensor
    scale: Tensor | None = None
    expanded: Expanded | None = None
    """Of ternary codes: the same in bf16, where that is kept."""
    packed: Packed | None = None
    """Of ternary codes: the same in two bits, while decoding."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The product in `dtype`, rounded once."""
        if self.scale is None:
            return self.values.to(dtype)
        work = torch.promote_types(dtype, torch.float32)
        return (self.values.to(work) * self.scale.to(work)).to(dtype)


class TernaryCache:
    """Ternary codes of one weight, good until the weight changes: quantized once per step, not per microbatch."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._operand: Operand | None = None

    def get(self, version: int | None, compute: Callable[[], Operand], expander: Expander | None = None) -> Operand:
        """The operand of weight version `version`, computed if it is another than the last; None: always computed.

        What is kept, `expander` brings to bf16 as well.
        """
        if version is None:
            return compute()
        if self._operand is None or version != self._version:
            self._operand = None  # its memory serves the new one
            operand = compute()
            if expander is not None and operand.scale is not None:
                operand = replace(operand, expanded=expander.expand(operand.values, operand.scale.flatten()))
            self.put(version, operand)
            return operand
        return self._operand

    def put(self, version: int, operand: Operand) -> None:
        """Codes [O,D] and scale ([1] or [O, 1]) of weight version `version`, computed elsewhere."""
        self._operand, self._version = operand, version


@dataclass(frozen=True)
class LinearCall:
    """Everything but the tensors of one forward pass."""

    format: LinearFormat
    parts: WeightParts
    sharding: Sharding = field(default_factory=Sharding)
    sparsity: float = 0.0
    """Sparsity of this step: the format's, times the warm-up's progress."""
    quantization: float = 1.0
    """lambda in x + lambda (q(x) - x); below 1 the product is one of floats."""
    counts: ZeroCounts | None = None
    """Where zeros are counted; None when nobody asks."""
    kernels: Kernels = field(default_factory=ReferenceKernels)
    """What the products and the sparsification run on."""
    cache: TernaryCache | None = None
    """Where the codes of the weight are kept between optimizer steps; None: nowhere."""
    weight_version: int | None = None
    """Changes whenever the weights do; None: unknown, nothing is kept."""
    expander: Expander | None = None
    """What makes the bf16 copy that is kept beside cached codes; None: every backward pass brings them to bf16."""
