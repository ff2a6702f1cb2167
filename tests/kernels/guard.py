"""Memory in which a kernel that strays is noticed: for kernels on the interpreter what compute-sanitizer is on a GPU.

Within `GuardedMemory` every new CPU tensor ends, but for 15 bytes at most, where a page begins that nobody may touch:
reading or writing behind it ends the process with a segmentation fault.  The bytes in front of it, and those of
`torch.empty`, are 0xFF: NaN in every floating-point type, so that what nobody wrote is noticed, too.
"""

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PAGE = mmap.PAGESIZE
_ALIGNMENT = 16
"""Bytes; kernels refuse operands that are aligned to less."""
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class GuardedMemory(TorchDispatchMode):
    """Moves what an operation returns, unless it shares memory with what the operation was given."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        is_empty = "empty" in func.overloadpacket.__name__
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_cpu and leaf.numel() and _storage(leaf) not in given:
                _move(leaf, copy=not is_empty)
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _move(tensor: Tensor, *, copy: bool) -> None:
    old = tensor.untyped_storage()
    new = guarded(old.nbytes())
    if copy:
        new.copy_(torch.empty(0, dtype=torch.uint8).set_(old))
    tensor.set_(new.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]


def guarded(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of 0xFF between two pages that nobody may touch."""
    span = -(-num_bytes // _PAGE) * _PAGE
    memory = mmap.mmap(-1, span + 2 * _PAGE)
    memory[_PAGE : _PAGE + span] = b"\xff" * span
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + _PAGE + span):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = _PAGE + (span - num_bytes) // _ALIGNMENT * _ALIGNMENT
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
