"""Tokens travel to their experts as codes and their gradients come back as floats, through megatron-core's dispatchers.

A dispatcher permutes tokens, moves them between ranks and sorts them by expert (dispatch), and does all of it backwards
with the experts' outputs, summing the copies of a token (combine).  Dispatch is a linear map, a selection of rows, and
combine is its transpose.  So the gradient of dispatched tokens is what combine makes of it, and codes, which carry no
gradient themselves, need no hand-written communication:

    forward     rows of bytes -> dispatch -> codes of the local experts
    backward    dX of the experts' first product, bf16 -> combine -> dX of the tokens

Autograd needs a tensor to hang the gradient on: the carrier, of the experts' input shape and without memory (one
element, expanded).  megatron-core's dispatchers keep the state of the last microbatch in attributes, and pipeline
schedules run several forward passes before a backward pass, so each carrier holds a shallow copy of the dispatcher as
it was.  The copy is told to reduce in the gradient's type: megatron-core would use that of the probabilities, float32.

`full` dispatch hands everything through, for experts that do not quantize or quantize differently.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from moe.wire import pack, unpack
from qsparse_layers.linear_call import Codes


class DispatcherError(ValueError):
    """A dispatcher whose package is not installed."""


def check_dispatcher(kind: str) -> None:
    """Refuse `model.moe.dispatcher` if it cannot run here; megatron-core would say so without naming the key.

    Raises:
        DispatcherError: `flex` without DeepEP.
    """
    if kind == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise DispatcherError(
            "model.moe.dispatcher=flex needs the package deep_ep (github.com/deepseek-ai/DeepEP), which is not "
            "installed; use model.moe.dispatcher=alltoall"
        )


@dataclass(frozen=True)
class ExpertInput:
    """Tokens of the local experts, sorted by expert."""

    x: Tensor
    """[T, D]: the tokens; with codes only its type, shape and gradient mean anything."""
    codes: Codes | None = None
    """What the experts' first product multiplies, if tokens travelled as codes."""

    def split(self, sizes: list[int]) -> list["ExpertInput"]:
        """The tokens of each expert."""
        parts = self.x.split(sizes)
        if self.codes is None:
            return [ExpertInput(part) for part in parts]
        codes = map(Codes, self.codes.values.split(sizes), self.codes.scale.split(sizes))
        return list(map(ExpertInput, parts, codes))


class CodeDispatcher:
    """`MoETokenDispatcher` around another one.

    Args:
        inner: megatron-core's dispatcher, or `LocalDispatcher`.
        quantize: codes of tokens [T, D], or None if tokens must travel as they are.
    """

    def __init__(self, inner: Any, quantize: Callable[[Tensor], Codes | None]) -> None:
        self._inner, self._quantize = inner, quantize
        self._tokens: Tensor | None = None

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, D] -> rows in the order in which they are sent, and their probabilities."""
        with torch.no_grad():
            codes = self._quantize(hidden.reshape(-1, hidden.shape[-1]))
        self._tokens = None
        if codes is None:
            return self._inner.dispatch_preprocess(hidden, routing_map, probs)
        self._tokens = hidden
        rows = pack(codes).view(*hidden.shape[:-1], -1)
        return self._inner.dispatch_preprocess(self._as_sent(rows), routing_map, probs)

    def token_dispatch(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and probabilities to the ranks of their experts."""
        return self._inner.token_dispatch(rows, probs)

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[ExpertInput, Tensor, Tensor]:
        """Input of the local experts, tokens per local expert, and a probability per token."""
        rows, tokens_per_expert, probs = self._inner.dispatch_postprocess(rows, probs)
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return ExpertInput(rows), tokens_per_expert, probs
        codes = unpack(rows.view(torch.int8), tokens.shape[-1])
        carrier = _Carrier.apply(tokens, rows.shape[0], _Transpose(self._inner, tokens))
        return ExpertInput(carrier, codes), tokens_per_expert, probs

    def combine_preprocess(self, hidden: Tensor) -> Tensor:
        """Outputs of the local experts in the order in which they are sent back."""
        _set_width(self._inner, hidden.shape[-1])
        return self._inner.combine_preprocess(hidden)

    def token_combine(self, hidden: Tensor) -> Tensor:
        """Send outputs to the ranks of their tokens."""
        return self._inner.token_combine(hidden)

    def combine_postprocess(self, hidden: Tensor) -> Tensor:
        """[s, b, D], the copies of each token summed."""
        return self._inner.combine_postprocess(hidden)

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """None: experts allocate their own (asked for by megatron-core 0.19)."""
        return None, None

    def _as_sent(self, rows: Tensor) -> Tensor:
        """DeepEP moves bfloat16 only; it copies, so any bytes may pose as such."""
        return rows.view(torch.bfloat16) if isinstance(self._inner, MoEFlexTokenDispatcher) else rows


class _Transpose:
    """The transpose of one dispatch: gradients of dispatched tokens to gradients of tokens."""

    def __init__(self, dispatcher: Any, tokens: Tensor) -> None:
        self._dispatcher = copy.copy(dispatcher)
        self._shape = tokens.shape
        if hasattr(dispatcher, "_comm_manager"):
            self._dispatcher._comm_manager = copy.copy(dispatcher._comm_manager)
        for name in ("probs", "local_probs"):  # only their type is asked for
            if hasattr(dispatcher, name):
                setattr(self._dispatcher, name, tokens.new_empty(0))

    def __call__(self, grad: Tensor) -> Tensor:
        _set_width(self._dispatcher, grad.shape[-1])
        rows = self._dispatcher.token_combine(self._dispatcher.combine_preprocess(grad.contiguous()))
        return self._dispatcher.combine_postprocess(rows).view(self._shape)


def _set_width(dispatcher: Any, num_features: int) -> None:
    """Combine restores the shapes that dispatch noted; what comes back has features where bytes were sent."""
    for owner in (dispatcher, getattr(dispatcher, "_comm_manager", None)):
        for name in ("hidden_shape", "hidden_shape_before_permute"):
            shape = getattr(owner, name, None)
            if shape is not None:
                setattr(owner, name, torch.Size((*shape[:-1], num_features)))


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, num_rows: int, transpose: _Transpose) -> Tensor:
        ctx.transpose = transpose
        return tokens.new_empty(1).expand(num_rows, tokens.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grads[0]), None, None
