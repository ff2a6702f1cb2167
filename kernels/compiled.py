"""Launching a compiled kernel again without asking Triton which one it is.

Triton chooses among the compiled forms of a kernel by the types, alignments and divisibilities of all arguments, and
with descriptors by the text of their layouts: tens of microseconds in Python per launch, more than many a kernel takes
on the GPU.  Here the first launch goes Triton's way and the form that it returns is kept under a short key.

The key holds what Triton specializes on: the compile-time arguments, element types, pointers at multiples of 16 bytes,
integers that are 1 or multiples of 16.  What Triton may come to specialize on beyond that would have to be added here.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1


class CompiledForms:
    """A kernel whose parameters are runtime arguments first and compile-time ones after them."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._forms: dict[Hashable, Any] = {}

    def launch(self, programs: int, arguments: tuple, constants: dict[str, Any]) -> None:
        """Run `programs` programs on the current device and stream.

        Args:
            programs: size of the one-dimensional grid.
            arguments: tensors, tensor descriptors, integers and None, in the order of the parameters.
            constants: all compile-time parameters, in their order.
        """
        key = (torch.cuda.current_device(), *constants.values(), *map(_kind, arguments))
        form = self._forms.get(key)
        if form is None:
            names = self._kernel.arg_names[len(arguments) :]
            if names != list(constants):
                raise ValueError(f"compile-time arguments {list(constants)}, the kernel takes {names} in this order")
            self._forms[key] = self._kernel[(programs,)](*arguments, **constants)
        else:
            form[(programs, 1, 1)](*arguments, *constants.values())


def _kind(argument: Any) -> Hashable:
    if type(argument) is int:
        return argument % 16 == 0, argument == 1, argument > _INT32_MAX
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return None if argument is None else argument.base.dtype
