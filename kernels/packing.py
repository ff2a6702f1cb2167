"""Two bits per ternary weight, in the two layouts that the decode kernels read.

A row of N codes is stored in U units of P two-bit fields.  Field p of unit u holds entry p U + u ("planes"):

    column   packs W^T [D, O] along O. Units are int32 words of 16 fields, a field holds t + 1 in {0, 1, 2}.
             An input feature's weights for all outputs are one run of bytes, so a kernel skips the runs of features
             whose activation is zero.  For one or a few tokens.
    row      packs W [O, D] along D. Units are bytes of 4 fields, a field holds t in two's complement {3, 0, 1}.
             Codes of one output lie next to each other along the axis that matrix units sum over.  For batches, where
             the union of the tokens' masks leaves little to skip.

The obvious way gives neighbouring weights to one unit.  With planes, field p of consecutive units is a run of
consecutive entries, so that decoding needs no shuffle.  The fields make decoding cheap: in the column layout a masked
byte is an unsigned operand of the byte-wise dot product; in the row layout `(word << (6 - 2 p)) & 0xC0C0C0C0` is four
int8 operands of the matrix unit, 64 t each.

Rows are padded with weight 0 to whole blocks of 256 codes, 64 bytes, so that every load is 16 bytes wide.

Shapes: D input features, O output features, W int32 words per row, U units per row (W or 4 W).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.tile_launch import check_tensor

Layout = Literal["column", "row"]
BLOCK_CODES = 256
CODES_PER_WORD = 16


@dataclass(frozen=True)
class PackedTernary:
    """A ternary matrix [O, D] in two bits per weight.

    `words` is int32 [D, W] in the column layout and [O, W] in the row layout.
    """

    words: Tensor
    layout: Layout
    out_features: int
    in_features: int

    @property
    def words_per_row(self) -> int:
        """W: words of one input feature (column) or one output feature (row), a multiple of 16."""
        return self.words.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.words.numel() * self.words.element_size()


def words_per_row(num_codes: int) -> int:
    """int32 words that hold a row of `num_codes` codes, in whole blocks of 256 codes."""
    return -(-num_codes // BLOCK_CODES) * (BLOCK_CODES // CODES_PER_WORD)


def pack_ternary(weight_OD: Tensor, *, layout: Layout) -> PackedTernary:
    """Pack int8 ternary codes.

    Args:
        weight_OD: int8 [O, D] with values -1, 0, 1, as `reference.ternary_codes` returns them.
        layout: "column" to skip zero activations, "row" for batches.

    Raises:
        ValueError: not an int8 matrix, or a value other than -1, 0 and 1.
    """
    check_tensor("weight_OD", weight_OD, dtype=torch.int8, shape=(None, None))
    if layout not in ("column", "row"):
        raise ValueError(f"layout: {layout!r}, expected 'column' or 'row'")
    if weight_OD.numel() == 0:
        raise ValueError(f"weight_OD: shape {list(weight_OD.shape)}, expected at least one row and one column")
    smallest, largest = (int(bound) for bound in weight_OD.aminmax())
    if smallest < -1 or largest > 1:
        wrong = smallest if smallest < -1 else largest
        raise ValueError(f"weight_OD: holds {wrong}, expected ternary codes -1, 0 and 1")
    out_features, in_features = weight_OD.shape
    rows = weight_OD.t() if layout == "column" else weight_OD
    return PackedTernary(_pack_planes(rows, layout), layout, out_features, in_features)


def _pack_planes(rows_RN: Tensor, layout: Layout) -> Tensor:
    num_rows, num_codes = rows_RN.shape
    num_words = words_per_row(num_codes)
    planes, units, unit = _units(num_words, layout)
    padded = torch.zeros(num_rows, planes * units, dtype=torch.int8, device=rows_RN.device)
    padded[:, :num_codes] = rows_RN
    fields = padded + 1 if layout == "column" else padded & 3
    packed = torch.zeros(num_rows, units, dtype=unit, device=rows_RN.device)
    for plane, field_RU in enumerate(fields.view(num_rows, planes, units).unbind(1)):
        packed |= field_RU.to(unit) << (2 * plane)
    return packed.view(torch.int32)


def unpack_ternary(packed: PackedTernary) -> Tensor:
    """int8 codes [O, D] of a packed weight: the inverse of `pack_ternary`."""
    planes, _, unit = _units(packed.words_per_row, packed.layout)
    units = packed.words.view(unit)
    fields = torch.cat([((units >> (2 * plane)) & 3).to(torch.int8) for plane in range(planes)], dim=1)
    if packed.layout == "column":
        return (fields[:, : packed.out_features] - 1).t().contiguous()
    return ((fields[:, : packed.in_features] ^ 2) - 2).contiguous()  # sign extension from two bits


def _units(num_words: int, layout: Layout) -> tuple[int, int, torch.dtype]:
    """Fields per unit, units per row, and the type of a unit."""
    return (16, num_words, torch.int32) if layout == "column" else (4, 4 * num_words, torch.uint8)


def check_packed(name: str, packed: PackedTernary, layout: Layout) -> None:
    """Refuse a packed weight of the other layout, or whose words do not fit its sizes.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """
    if packed.layout != layout:
        raise ValueError(f"{name}: layout {packed.layout!r}, expected {layout!r}; pack_ternary(..., layout={layout!r})")
    rows, codes = packed.in_features, packed.out_features
    if layout == "row":
        rows, codes = codes, rows
    check_tensor(f"{name}.words", packed.words, dtype=torch.int32, shape=(rows, words_per_row(codes)))
