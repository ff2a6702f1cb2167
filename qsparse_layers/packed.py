"""Ternary weights in two bits for as long as nothing trains: what decoding reads instead of int8 codes.

A layer finds the packed form beside its codes (`linear_call.Operand`) and multiplies by it where few tokens come; more
go to the product of training.  Both give the same bits.  Weights that share a grouped or stacked product are left out,
and so is everything under the reference kernels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from qsparse_layers.functional import prepare_weight
from qsparse_layers.linear_call import Sharding
from qsparse_layers.parallel import QSparseLinearMixin


@contextmanager
def packed_weights(layers: Iterable[QSparseLinearMixin], num_tokens: int) -> Iterator[None]:
    """Within this, layers find their weights packed as they are now.

    Args:
        layers: linear layers of a model whose schedule names a version of the weights.
        num_tokens: that will be multiplied at once.
    """
    before = []
    for layer in layers:
        packer, version = layer.kernels.packer, layer.schedule.weight_version
        quantizes = layer.format.weights == "ternary" and layer.format.activations == "int8"
        is_full = layer.schedule.quantization == 1.0
        if packer is None or version is None or not (quantizes and is_full and packer.takes(layer.weight)):
            continue
        with torch.no_grad():
            operand = prepare_weight(layer.weight, layer.call(Sharding(weight=layer.tp_group)))
        assert operand.scale is not None
        packed = packer.pack(operand.values, operand.scale.flatten(), num_tokens)
        layer.cache.put(version, replace(operand, packed=packed))
        before.append((layer.cache, version, operand))
    try:
        yield
    finally:
        for cache, version, operand in before:
            cache.put(version, operand)
