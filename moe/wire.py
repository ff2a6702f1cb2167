"""What a token looks like on its way to an expert: one row of bytes, int8 codes and then their float32 scale.

    | D bytes: codes q[t, 0..D) | 4 bytes: scale s[t] | up to 12 bytes: padding to a multiple of 16 |

The obvious way sends x in bf16, 2 D bytes, and every expert quantizes what arrives.  Quantization and top-K look at one
token only, so they may as well come first: D + 16 bytes at most travel, and the codes are those that the expert would
have made, bit for bit.  Codes and scale share a row, so that one collective moves them and megatron-core's dispatchers
permute, send and sort them as they do floats.  Rows are multiples of 16 bytes because DeepEP copies in such words.

Shapes: T tokens, D features, B bytes of a row.
"""

import torch
from torch import Tensor

from qsparse_layers.linear_call import Codes

ROW_ALIGNMENT = 16
_SCALE_BYTES = 4


def row_bytes(num_features: int) -> int:
    """B of a token with `num_features` features."""
    return -(-(num_features + _SCALE_BYTES) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def pack(codes: Codes) -> Tensor:
    """int8 [T, B] from codes [T, D] with scales [T, 1]."""
    T, D = codes.values.shape
    rows_TB = codes.values.new_empty(T, row_bytes(D))
    word = _word(D)
    rows_TB.view(word)[:, : D // word.itemsize] = codes.values.view(word)
    rows_TB[:, D : D + _SCALE_BYTES] = codes.scale.contiguous().view(torch.int8)
    rows_TB[:, D + _SCALE_BYTES :] = 0
    return rows_TB


def unpack(rows_TB: Tensor, num_features: int) -> Codes:
    """Codes [T, D] and scales [T, 1] of packed rows."""
    scale = rows_TB[:, num_features : num_features + _SCALE_BYTES].clone().view(torch.float32)
    word = _word(num_features)
    values = rows_TB.view(word)[:, : num_features // word.itemsize].contiguous()
    return Codes(values.view(torch.int8), scale.view(-1, 1))


def _word(num_features: int) -> torch.dtype:
    """Copied as: PyTorch copies rows with gaps element by element, eight bytes in the time of one."""
    return torch.int64 if num_features % 8 == 0 else torch.int8
