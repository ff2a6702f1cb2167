"""Experts in bf16 as block-sparse products, against a loop over experts in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.activations import squared_relu
from torch import Tensor

from kernels.dispatch import ReferenceKernels
from kernels.triton_kernels import TritonKernels
from moe.block_sparse import BlockSparseExperts
from moe.dispatcher import ExpertInput
from qsparse_layers.config import LinearFormat, QSparseConfig
from qsparse_layers.linear_call import Codes
from qsparse_layers.schedules import Schedule
from qsparse_layers.stats import ZeroCounts

HIDDEN, WIDTHS = 64, (256, 200)  # the second one is not a whole number of tiles
COUNTS = {"some empty": (0, 5, 130, 0), "one": (3,), "whole tiles": (128, 256)}
GATED = {"relu2_glu": True, "relu2": False}


def randoms(*shape: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.2 * torch.randn(shape, generator=generator)).bfloat16().to(device)


def experts(
    num_experts: int, branches: int, device: str, schedule: Schedule, width: int = WIDTHS[1]
) -> tuple[list[Any], list[Any]]:
    """What the products ask of linear layers."""

    def layer(rows: int, columns: int, seed: int) -> SimpleNamespace:
        weight = torch.nn.Parameter(randoms(rows, columns, device=device, seed=seed))
        given = {"format": LinearFormat(), "kernels": TritonKernels(), "schedule": schedule, "counts": ZeroCounts()}
        return SimpleNamespace(weight=weight, **given)

    ups = [layer(branches * width, HIDDEN, 2 * number) for number in range(num_experts)]
    return ups, [layer(HIDDEN, width, 2 * number + 1) for number in range(num_experts)]


def looped(
    x: Tensor, counts: tuple[int, ...], ups: list[Any], downs: list[Any], branches: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, leaves (tokens, up and down projections), and hidden rows of each expert, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *(layer.weight for layer in (*ups, *downs)))]
    hidden, outputs = [], []
    for number, rows in enumerate(leaves[0].split(counts)):
        before = rows @ leaves[1 + number].t()
        gate, up = before.chunk(2, dim=1) if branches == 2 else (before, torch.ones_like(before))
        hidden.append(gate.relu().square() * up)
        outputs.append(hidden[-1] @ leaves[1 + len(ups) + number].t())
    return torch.cat(outputs), leaves, hidden


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got.float()).all()
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's: tiles that are not in use hold anything
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("name", COUNTS)
def test_block_sparse_experts_are_the_loop_over_experts(name: str, activation: str, width: int, device: str) -> None:
    """bf16 rounds the hidden layer twice and each result once, 2^-9 each; an expert without tokens gets zeros."""
    bound = 8e-3 if device == "cuda" else 2e-2  # the interpreter cuts off instead of rounding
    counts, branches = COUNTS[name], 1 + GATED[activation]
    schedule = Schedule(QSparseConfig())
    schedule.counting = True
    ups, downs = experts(len(counts), branches, device, schedule, width)
    config: Any = SimpleNamespace(activation_func=squared_relu, gated_linear_unit=GATED[activation])
    x = randoms(sum(counts), HIDDEN, device=device, seed=100).requires_grad_()
    grad = randoms(sum(counts), HIDDEN, device=device, seed=101)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    runner = BlockSparseExperts(config)
    assert runner.takes(ExpertInput(x), ups, downs)
    want, leaves, hidden = looped(x, counts, ups, downs, branches)
    want_grads = torch.autograd.grad(want, leaves, grad.double())
    weights = [layer.weight for layer in (*ups, *downs)]
    got = runner.outputs(x, offsets, ups, downs)
    assert error(got, want.detach()) < bound
    for mine, theirs, leaf in zip(torch.autograd.grad(got, [x, *weights], grad), want_grads, leaves, strict=True):
        assert mine.shape == leaf.shape
        assert error(mine, theirs) < bound if theirs.any() else not mine.any()
    for number, (up, down) in enumerate(zip(ups, downs, strict=True)):
        zeros, features, *_ = down.counts.take(torch.device(device)).tolist()
        assert (zeros, features) == (float((hidden[number] == 0).sum()), float(hidden[number].numel()))
        assert up.counts.take(torch.device(device))[1] == counts[number] * HIDDEN


def test_gradients_are_added_to_buffers_of_a_gpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("layers on a CPU return their gradients")
    ups, downs = experts(2, 2, device, Schedule(QSparseConfig()))
    weights = [layer.weight for layer in (*ups, *downs)]
    config: Any = SimpleNamespace(activation_func=squared_relu, gated_linear_unit=True)
    x, grad = (randoms(140, HIDDEN, device=device, seed=seed) for seed in (1, 2))
    offsets = torch.tensor([0, 100, 140], dtype=torch.int32, device=device)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(BlockSparseExperts(config).outputs(x, offsets, ups, downs), weights, grad)

    returned = gradients()
    for weight in weights:
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    gradients()
    for weight, dw in zip(weights, returned, strict=True):
        assert weight.grad_added_to_main_grad
        assert torch.equal(weight.main_grad, 1 + dw.float())


def test_weights_are_stacked_once_per_step(device: str) -> None:
    schedule = Schedule(QSparseConfig())
    schedule.weights_changed()
    ups, downs = experts(1, 2, device, schedule)
    config: Any = SimpleNamespace(activation_func=squared_relu, gated_linear_unit=True)
    x = randoms(9, HIDDEN, device=device, seed=1)
    offsets = torch.tensor([0, 9], dtype=torch.int32, device=device)
    runner = BlockSparseExperts(config)
    first = runner.outputs(x, offsets, ups, downs)
    with torch.no_grad():
        downs[0].weight.mul_(2)
    assert torch.equal(runner.outputs(x, offsets, ups, downs), first)
    schedule.weights_changed()
    assert torch.equal(runner.outputs(x, offsets, ups, downs), 2 * first)


def test_other_experts_run_elsewhere(device: str) -> None:
    ups, downs = experts(2, 2, device, Schedule(QSparseConfig()))
    x = randoms(8, HIDDEN, device=device, seed=1)
    runner = BlockSparseExperts(SimpleNamespace())  # type: ignore[arg-type]
    assert runner.takes(ExpertInput(x), ups, downs)
    assert not runner.takes(ExpertInput(x[:0]), ups, downs)
    assert not runner.takes(ExpertInput(x.float()), ups, downs)
    codes = Codes(x.to(torch.int8), x[:, :1].float())
    assert not runner.takes(ExpertInput(x, codes), ups, downs)
    for format_ in (LinearFormat(sparsity=0.5), LinearFormat(sub_norm=True), LinearFormat(weights="ternary")):
        downs[1].format = format_
        assert not runner.takes(ExpertInput(x), ups, downs)
    downs[1].format = LinearFormat()
    ups[0].kernels = ReferenceKernels()
    assert not runner.takes(ExpertInput(x), ups, downs)
