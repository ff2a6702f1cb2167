"""Rows spread over ranks through the kernels and through PyTorch; run it with torchrun, exits with 1 if they differ."""

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import ReferenceKernels
from kernels.triton_kernels import TritonKernels
from qsparse_layers.collectives import gather_rows
from qsparse_layers.config import LinearFormat
from qsparse_layers.functional import prepare_input, qsparse_linear
from qsparse_layers.linear_call import Front, LinearCall, Sharding, WeightParts
from qsparse_layers.norm import fused_rms_norm, rms_norm
from qsparse_layers.sharded import fused_for
from tests.kernels.test_sparsify import rows

FORMATS = {
    "dense": {},
    "global": {"sparsity": 0.45},
    "shard": {"sparsity": 0.45, "topk_scope": "shard"},
    "block": {"sparsity": 0.5, "pattern": "block", "block_size": 8},
}


def differences() -> list[str]:
    """Cases whose codes or scales differ on this rank."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    for name, keys in FORMATS.items():
        layout = LinearFormat(weights="ternary", activations="int8", **keys)
        for kind in ("heavy", "integers"):  # integers: many ties
            x = rows(kind, 4, 96, "cpu").view(2, 2, 96).chunk(group.size(), dim=-1)[group.rank()]
            operands = []
            for kernels in (TritonKernels(), ReferenceKernels()):
                parts, sharding = WeightParts(1, (8,)), Sharding(features=group)
                call = LinearCall(layout, parts, sharding, layout.sparsity, kernels=kernels)
                operands.append(prepare_input(x, call)[0])
            fast, slow = operands
            assert fast.scale is not None and slow.scale is not None
            if not (torch.equal(fast.values, slow.values) and torch.equal(fast.scale, slow.scale)):
                found.append(f"{name}, {kind}")
    return found


def gradient_differences() -> list[str]:
    """Backward products of gathered gradients that differ from those of a gradient that was whole."""
    group = dist.group.WORLD
    assert group is not None
    grad = rows("heavy", 12, 48, "cpu").view(6, 2, 48)
    mine = grad.chunk(group.size())[group.rank()]
    x = torch.randint(-127, 128, (6, 2, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    weight = torch.randint(-1, 2, (48, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    scale = torch.linspace(0.01, 0.1, 12).view(6, 2, 1)
    found = []
    for kernels, e4m3, several in itertools.product(
        (TritonKernels(), ReferenceKernels()), (False, True), (False, True)
    ):
        weight_scale = torch.linspace(0.5, 1.5, 48) if several else torch.full((1,), 0.7)
        make = partial(kernels.backward, weight=weight, weight_scale=weight_scale, x_scale=scale, e4m3=e4m3)
        made = make(grad), make(mine, gather=partial(gather_rows, group=group))
        whole, gathered = ((b.dgrad(), b.wgrad(x, scale, None)) for b in made)
        if whole[0].shape != x.shape or not all(map(torch.equal, whole, gathered)):
            found.append(f"{type(kernels).__name__}, e4m3 {e4m3}, several scales {several}")
    return found


def norm_error() -> float:
    """Largest difference between the two norms in values and gradients, relative to the largest value."""
    group = dist.group.WORLD
    assert group is not None
    shards = [rows("normal", 6, 64, "cpu").chunk(group.size(), dim=-1)[group.rank()] for _ in range(2)]
    gain = torch.linspace(0.5, 1.5, 64).bfloat16().chunk(group.size())[group.rank()]
    fused = fused_for(TritonKernels(), LinearFormat(), torch.bfloat16, 32, group)
    assert fused is not None
    results = []
    for is_fast in (True, False):
        x, weight = (t.clone().requires_grad_() for t in (shards[0], gain))
        y = fused_rms_norm(x, weight, 1e-5, fused) if is_fast else rms_norm(x, weight, 64, 1e-5, group=group)
        results.append([y, *torch.autograd.grad(y, (x, weight), shards[1])])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def front_error() -> float:
    """As `norm_error`, of gated feed-forward layers that share their rows, against one that has them alone."""
    group = dist.group.WORLD
    assert group is not None
    layout = LinearFormat(weights="ternary", activations="int8", sparsity=0.5, sub_norm=True)
    size, rank, parts = group.size(), group.rank(), WeightParts(1, (16,))
    gate, up, grad = rows("normal", 5, 64, "cpu"), rows("heavy", 5, 64, "cpu"), rows("normal", 5, 16, "cpu")
    gain, weight = torch.linspace(0.5, 1.5, 64).bfloat16(), rows("normal", 16, 64, "cpu")

    def run(of_rank: Callable[[Tensor], Tensor], shared: dist.ProcessGroup | None) -> list[Tensor]:
        kernels = TritonKernels()
        fused = fused_for(kernels, layout, torch.bfloat16, of_rank(gain).numel(), shared)
        assert fused is not None
        leaves = [t.clone().requires_grad_() for t in (of_rank(gate), of_rank(up), of_rank(weight), of_rank(gain))]
        call = LinearCall(layout, parts, Sharding(weight=shared, features=shared), layout.sparsity, kernels=kernels)
        front = Front(fused, "relu2_glu", 1e-5)
        y = qsparse_linear(torch.cat(leaves[:2], dim=-1), leaves[2], call, front, leaves[3])
        grads = torch.autograd.grad(y, leaves, grad)
        y = y.detach().float()
        if shared is not None:
            dist.all_reduce(y, group=shared)
        return [y, *grads]

    def mine(t: Tensor) -> Tensor:
        return t.chunk(size, dim=-1)[rank]

    whole = run(lambda t: t, None)
    expected = [whole[0], *map(mine, whole[1:])]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(run(mine, group), expected, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wrong = differences() + gradient_differences()
    if (error := norm_error()) > 2**-6:  # bf16 results, which the interpreter cuts off
        wrong.append(f"norm: {error}")
    if (error := front_error()) > 2**-6:
        wrong.append(f"activation and norm: {error}")
    dist.destroy_process_group()
    sys.exit("; ".join(wrong) or 0)
