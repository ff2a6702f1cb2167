"""megatron-core's MoE layer with tokens that travel as codes, and how a model's MoE layers learn their formats.

The way of a token is drawn in docs/moe.md.  Route, shared expert, combine and sum are megatron-core's; this layer puts
`CodeDispatcher` around its dispatcher and decides whether tokens can be quantized before they leave.  That takes one
format for all experts of the layer, on every rank, and quantization without a warm-up in progress; otherwise floats
travel and each expert quantizes by its own format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from kernels.dispatch import Kernels
from moe.config import MoEConfig
from moe.dispatcher import CodeDispatcher, check_dispatcher
from moe.load import RouterLoad
from moe.local_dispatcher import LocalDispatcher, can_stay_local
from qsparse_layers.config import LinearFormat, QSparseConfig, layer_format
from qsparse_layers.functional import is_one_pass, prepare_input
from qsparse_layers.linear_call import Codes, LinearCall, WeightParts
from qsparse_layers.rules import global_paths
from qsparse_layers.schedules import Schedule


@dataclass(frozen=True)
class _Quantizer:
    """Codes of tokens that all experts of a layer would make alike."""

    format: LinearFormat
    schedule: Schedule
    kernels: Kernels

    def __call__(self, tokens: Tensor) -> Codes | None:
        """Codes of tokens [T, D]; None while quantization is warming up."""
        call = LinearCall(
            format=self.format,
            parts=WeightParts(1, (1,)),
            sparsity=self.schedule.sparsity(self.format),
            quantization=self.schedule.quantization,
            kernels=self.kernels,
        )
        if not is_one_pass(call):
            return None
        operand, _ = prepare_input(tokens, call)
        assert operand.scale is not None
        return Codes(operand.values, operand.scale)


def _travels_as_it_is(tokens: Tensor) -> None:
    """No codes."""


class QSparseMoELayer(MoELayer):
    """`MoELayer` whose tokens may travel as int8 codes."""

    token_dispatcher: Any

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        check_dispatcher(config.moe_token_dispatcher_type)
        super().__init__(config, *args, **kwargs)

    def configure(self, options: MoEConfig, formats: list[LinearFormat], schedule: Schedule, kernels: Kernels) -> None:
        """Decide how tokens travel; called once, before the optimizer is built.

        Args:
            options: the MoE section of the configuration.
            formats: format of the first projection of every expert, those of other ranks included.
            schedule: shared by all layers.
            kernels: what quantizes.
        """
        inner = self.token_dispatcher
        if can_stay_local(inner):
            inner = LocalDispatcher(self.config)
        formats_agree = len({_input_format(layout) for layout in formats}) == 1
        quantize: Callable[[Tensor], Codes | None] = _travels_as_it_is
        if options.dispatch == "codes" and formats_agree and formats[0].activations != "full":
            quantize = _Quantizer(formats[0], schedule, kernels)
        self.token_dispatcher = CodeDispatcher(inner, quantize)
        # Experts have their own optimizer and gradient reduction under every layout, so that a checkpoint written with
        # one expert-parallel size loads with another; megatron-core splits them off with expert parallelism only.
        for parameter in self.experts.parameters():
            setattr(parameter, "allreduce", False)  # noqa: B010


def _input_format(layout: LinearFormat) -> tuple[Any, ...]:
    """What of a format decides the codes of an input."""
    return layout.activations, layout.sparsity, layout.pattern, layout.block_size, layout.rescale


@dataclass(frozen=True)
class RoutedLayer:
    """An MoE layer of this rank, by its path in the whole model."""

    path: str
    load: RouterLoad


def configure_moe_layers(
    model: Module, options: MoEConfig | None, config: QSparseConfig, schedule: Schedule, kernels: Kernels
) -> list[RoutedLayer]:
    """Configure every MoE layer of a chunk, after its linear layers; the layers in model order."""
    found = []
    for path, module in global_paths(model):
        if isinstance(module, QSparseMoELayer):
            assert options is not None
            experts = [f"{path}.experts.local_experts.{number}.linear_fc1" for number in range(options.num_experts)]
            module.configure(options, [layer_format(config, expert) for expert in experts], schedule, kernels)
            found.append(RoutedLayer(path, module.router.load))
    return found
