"""Computing the output of a linear layer again instead of keeping it for the backward pass.

The gate and up projections give the largest tensor that a transformer layer keeps: 2 F floats per token, for the
activation function behind them.  Their product is cheap on int8 codes, and the codes are kept anyway for the weight
gradient.  So what is saved under `recomputed` is a note which product it was, and the backward pass multiplies again:
the same integers, hence the same floats.

megatron-core's recomputation runs whole modules twice, quantization included, inside a checkpoint function; this one
repeats one product and changes nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qsparse_layers.functional import product_again


@contextmanager
def recomputed(product: Tensor) -> Iterator[None]:
    """What is saved for the backward pass in this block and lies in `product`'s memory is computed again when needed.

    Args:
        product: the result of `qsparse_linear`; anything else (without gradients: everything) is saved as usual.
    """
    compute = product_again(product)
    if compute is None:
        yield
        return
    address = product.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != address:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return compute().as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        yield
