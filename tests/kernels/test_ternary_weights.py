"""`TernaryWeights` hands every layer its codes and, where the layer keeps it, their bf16 form, always in one place."""

from types import SimpleNamespace
from typing import Any

import torch

from kernels.triton_kernels import WeightExpander
from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import prepare_weight
from qsparse_layers.linear_call import LinearCall, Operand, TernaryCache, WeightParts
from qsparse_layers.ternary import TernaryWeights

FORMAT = LinearFormat(weights="ternary", activations="int8")


def layer(parts: WeightParts, features: int, device: str, *, keeps: bool, ternary_scale: str = "part") -> Any:
    """What `TernaryWeights` reads of a layer; its tensor-parallel group is one rank."""
    rows = parts.groups * sum(parts.sizes)
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows)).bfloat16().to(device)
    return SimpleNamespace(
        weight=weight * torch.linspace(1, 3, rows, device=device)[:, None].bfloat16(),
        parts=parts,
        format=FORMAT.model_copy(update={"ternary_scale": ternary_scale}),
        cache=TernaryCache(),
        expander=WeightExpander() if keeps else None,
        tp_group=None,
    )


def own_codes(of: Any) -> Operand:
    """What the layer would make itself when it runs."""
    call = LinearCall(of.format, of.parts, cache=TernaryCache(), weight_version=1, expander=of.expander)
    return prepare_weight(of.weight, call)


def test_layers_find_what_they_would_make_themselves(device: str) -> None:
    layers = [
        layer(WeightParts(2, (16, 8, 8)), 32, device, keeps=True),
        layer(WeightParts(1, (16, 16)), 48, device, keeps=True, ternary_scale="matrix"),
        layer(WeightParts(1, (16,)), 64, device, keeps=True),
        layer(WeightParts(1, (8, 8)), 40, device, keeps=False),
    ]
    weights = TernaryWeights(layers)
    addresses = None
    for version in (1, 2):
        weights.refresh(version)
        found = [of.cache.get(version, lambda: 1 / 0) for of in layers]
        tensors = []
        for operand, of in zip(found, layers, strict=True):
            expected = own_codes(of)
            assert torch.equal(operand.values, expected.values)
            assert torch.equal(operand.scale, expected.scale)
            tensors += [operand.values, operand.scale]
            if of.expander is None:
                assert operand.expanded is expected.expanded is None
                continue
            assert torch.equal(operand.expanded.values, expected.expanded.values)
            assert torch.equal(operand.expanded.scale, expected.expanded.scale)
            assert operand.expanded.scale.data_ptr() % 16 == operand.expanded.values.data_ptr() % 16 == 0
            tensors += [operand.expanded.values, operand.expanded.scale]
            of.weight.mul_(torch.linspace(3, 1, len(of.weight), device=device)[:, None].bfloat16())
        assert addresses in (None, [tensor.data_ptr() for tensor in tensors])
        addresses = [tensor.data_ptr() for tensor in tensors]
