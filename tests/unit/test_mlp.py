"""megatron-core's feed-forward block keeps its parameters and its results when it becomes ours."""

from types import SimpleNamespace

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.mlp import MLP

from qsparse_layers.mlp import QSparseMLP, activate, fuse_activations


class Parent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP.__new__(MLP)  # its constructor needs process groups
        torch.nn.Module.__init__(self.mlp)
        self.mlp.config = SimpleNamespace(gated_linear_unit=True, activation_func=squared_relu)
        self.mlp.linear_fc1, self.mlp.linear_fc2 = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)


def test_an_adopted_block_has_the_same_parameters() -> None:
    parent = Parent()
    before = {name: id(parameter) for name, parameter in parent.named_parameters()}
    fuse_activations(parent)
    assert isinstance(parent.mlp, QSparseMLP)
    assert {name: id(parameter) for name, parameter in parent.named_parameters()} == before


def test_the_activation_without_kernels() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    gated = SimpleNamespace(gated_linear_unit=True, activation_func=squared_relu)
    assert activate(x, gated, None).tolist() == [[3.0, 0.0]]
    plain = SimpleNamespace(gated_linear_unit=False, activation_func=squared_relu)
    assert activate(x, plain, None).tolist() == [[1.0, 0.0, 9.0, 16.0]]
