"""Ternary codes on their way between ranks: one message of equal size from each, four codes in a byte.

Every rank has made the codes of a piece of a flat sequence, and all are to have the whole.  Pieces differ in length, an
all-gather wants equal messages, so that a message has U bytes for at most 4 U codes:

    field p (bits 2p, 2p+1) of byte u holds code p U + u, in two's complement {3, 0, 1}; 0 where there is none

`packing` does the same to matrices, whose rows it pads to what decode kernels read at once; here one row is a whole
piece, and unpacking puts the pieces next to each other without the padding.  In place, since layers look at the codes
through views that a CUDA graph has captured.

Shapes: R ranks, N codes of all of them, U bytes per message.
"""

import importlib
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.launch import cdiv

CODES_PER_BYTE = 4
_WIDTH = 16
"""Messages are a multiple of this, so that all fields of a message begin at aligned addresses."""


class CodeMessages:
    """The format of the messages that make up one sequence.

    Args:
        counts: codes of each rank's piece.
        device: of the codes.
    """

    def __init__(self, counts: list[int], device: torch.device) -> None:
        self.counts = counts
        self.num_codes = sum(counts)
        self.num_bytes = cdiv(cdiv(max(counts), CODES_PER_BYTE), _WIDTH) * _WIDTH
        """U, of one message."""
        starts = list(accumulate(counts, initial=0))
        self._starts = torch.tensor(starts, dtype=torch.int64, device=device)
        self._is_aligned = all(start % _WIDTH == 0 for start in starts)

    def pack(self, codes: Tensor) -> Tensor:
        """The message of a piece: int8 codes [at most 4 U], each -1, 0 or 1 -> uint8 [U].

        Raises:
            ValueError: other types, or more codes than fit.
        """
        if codes.dtype != torch.int8 or codes.dim() != 1 or codes.numel() > CODES_PER_BYTE * self.num_bytes:
            raise ValueError(
                f"codes are {codes.dtype} {list(codes.shape)}, a message takes at most "
                f"{CODES_PER_BYTE * self.num_bytes} int8"
            )
        if codes.is_cuda:
            return _triton().pack(codes, self.num_bytes)
        padded = codes.new_zeros(CODES_PER_BYTE * self.num_bytes)
        padded[: codes.numel()] = codes
        fields = padded.view(torch.uint8).view(CODES_PER_BYTE, self.num_bytes) & 3
        return fields[0] | (fields[1] << 2) | (fields[2] << 4) | (fields[3] << 6)

    def unpack(self, messages: Tensor, out: Tensor) -> None:
        """uint8 [R, U], one message of each rank -> the sequence, int8 [N], written to `out`.

        Raises:
            ValueError: other types or sizes.
        """
        if messages.dtype != torch.uint8 or messages.shape != (len(self.counts), self.num_bytes):
            expected = f"uint8 [{len(self.counts)}, {self.num_bytes}]"
            raise ValueError(f"messages are {messages.dtype} {list(messages.shape)}, expected {expected}")
        if out.dtype != torch.int8 or out.shape != (self.num_codes,):
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, expected int8 [{self.num_codes}]")
        if out.is_cuda:
            _triton().unpack(messages, self._starts, out, is_aligned=self._is_aligned)
            return
        for piece, message, count in zip(out.split(self.counts), messages, self.counts, strict=True):
            fields = torch.stack([(message >> (2 * field)) & 3 for field in range(CODES_PER_BYTE)]).view(torch.int8)
            piece.copy_(((fields ^ 2) - 2).flatten()[:count])  # sign extension from two bits


def _triton() -> Any:
    """Imported where it is used: machines without GPU may lack Triton."""
    return importlib.import_module("kernels.code_messages_triton")
