"""What is made of weights once per optimizer step."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qsparse_layers.parallel import QSparseLinearMixin

Made = TypeVar("Made")


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done to the tensor now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class PerStep(Generic[Made]):
    """A value made of the weights of layers that change together.

    A CUDA graph that is being captured makes it once more, so that its replays do.
    """

    def __init__(self) -> None:
        self._state: object = None
        self._value: Made | None = None

    def get(self, layer: QSparseLinearMixin, make: Callable[[], Made]) -> Made:
        """The value of the weights' present version, which `layer` knows; made anew if it does not."""
        version = layer.schedule.weight_version
        state = (version, is_captured(layer.weight))
        if self._value is not None and version is not None and state == self._state:
            return self._value
        self._value = None  # its memory serves the new one
        made = make()
        self._value, self._state = made, state
        return made
