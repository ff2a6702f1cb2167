"""Where the nonzero tiles of a block-sparse matrix lie: blocked compressed sparse rows, and the order of the transpose.

MegaBlocks (arXiv 2211.15841 sec. 5.1) keeps the tiles in row order, adds the row of each tile (a product that writes
tiles then finds its coordinates without a search), and a second index that visits the same tiles column by column, so
that products with the transpose read the values where they are instead of sorting copies.  Two more say in which order
to work: lines of tiles by falling length, so that programs end together, and pairs of tiles that share operands nearby.

Everything stays on the device.  The arrays have a `capacity` chosen by the host; the number of tiles in use is the last
row offset, and kernels leave the rest alone.  The obvious alternative, arrays of exactly the right length, makes the
host wait for the device whenever the pattern changes, that is at every step of a mixture of experts.

Shapes: R row blocks, C column blocks, N capacity in tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PAIR_ROWS = 16
"""Rows of tiles whose pairs `sdd` computes side by side."""


@dataclass(frozen=True)
class Topology:
    """Tile coordinates of a block-sparse matrix of R x C blocks; int32, all on one device.

    Tile i of the values has coordinates (rows[i], columns[i]).  Row r owns tiles row_offsets[r] to
    row_offsets[r + 1]; column c owns the tiles order[j] for j from column_offsets[c] to column_offsets[c + 1], which
    lie in rows rows_by_column[j].  Past the tiles (pairs) in use, all indices are 0.

    longest_rows [3, R] (longest_columns [3, C]) holds the rows by falling number of tiles, the first tile of each (its
    first place in `order`) and that number; an empty one has 1, the tile past the capacity, which reads as zeros.

    Tiles pairs[i] and pairs[i] + 1 are neighbours in a row, or pairs[i] is the last of an odd number.  The pairs of
    PAIR_ROWS rows advance together, first pairs first, so that programs side by side share columns as well as rows.
    """

    block: tuple[int, int]
    row_offsets: Tensor
    column_offsets: Tensor
    rows: Tensor
    columns: Tensor
    order: Tensor
    rows_by_column: Tensor
    longest_rows: Tensor
    longest_columns: Tensor
    pairs: Tensor
    num_pairs: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C), in blocks."""
        return self.row_offsets.shape[0] - 1, self.column_offsets.shape[0] - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense matrix, in elements."""
        return self.grid[0] * self.block[0], self.grid[1] * self.block[1]

    @property
    def capacity(self) -> int:
        """Tiles that the index arrays hold."""
        return self.rows.shape[0]


def check_block(block: tuple[int, int]) -> None:
    """Refuse tile sizes that no kernel takes.

    Raises:
        ValueError: a side is no power of two from 16 to 256.
    """
    for side in block:
        if side < 16 or side > 256 or side & (side - 1):
            raise ValueError(f"block={block}: expected powers of two from 16 to 256")


def from_mask(mask_RC: Tensor, block: tuple[int, int], *, capacity: int | None = None) -> Topology:
    """Topology of the true entries of `mask`.

    Args:
        mask_RC: bool, one entry per block.
        block: rows and columns of a tile, powers of two from 16 to 256.
        capacity: tiles that the arrays hold; true entries past it, in row order, are dropped, since an error would
            have to wait for the device.  Absent: the exact number, which waits for the device.

    Raises:
        ValueError: a wrong dtype, number of dimensions, block or capacity.
    """
    check_block(block)
    if mask_RC.dtype != torch.bool or mask_RC.dim() != 2:
        raise ValueError(f"mask_RC: {mask_RC.dtype} of {mask_RC.dim()} dimensions, expected torch.bool of 2")
    if capacity is None:
        capacity = int(mask_RC.sum())
    if not 0 <= capacity <= mask_RC.numel():
        raise ValueError(f"capacity={capacity}: expected 0 to {mask_RC.numel()}, the number of blocks")
    R, C = mask_RC.shape
    mask_RC = mask_RC & (_running_count(mask_RC) < capacity)
    row_offsets, by_row = _compress(mask_RC, capacity)
    column_offsets, by_column = _compress(mask_RC.t(), capacity)
    rows, columns = by_row // C, by_row % C
    position_RC = _running_count(mask_RC)
    order = position_RC[by_column % R, by_column // R]
    rows_by_column = by_column % R
    tile = torch.arange(capacity, device=mask_RC.device)
    used = tile < row_offsets[-1]
    pairs, num_pairs = _pairs(row_offsets, C, capacity)
    rows, columns, order, rows_by_column = (
        torch.where(used, index, 0).to(torch.int32) for index in (rows, columns, order, rows_by_column)
    )
    return Topology(
        block, row_offsets, column_offsets, rows, columns, order, rows_by_column,
        _longest(row_offsets, capacity), _longest(column_offsets, capacity), pairs, num_pairs,
    )  # fmt: skip


def _longest(offsets: Tensor, capacity: int) -> Tensor:
    """`Topology.longest_rows` or `longest_columns`."""
    counts = offsets.diff()
    lines = counts.argsort(descending=True, stable=True)
    counts = counts[lines]
    first = torch.where(counts > 0, offsets[lines], capacity)
    return torch.stack([lines, first, counts.clamp(min=1)]).to(torch.int32)


def _pairs(row_offsets: Tensor, C: int, capacity: int) -> tuple[Tensor, Tensor]:
    """(`Topology.pairs`, `num_pairs`): one entry per row and pair, which groups of rows walk pair by pair."""
    R, P = row_offsets.shape[0] - 1, (C + 1) // 2
    counts = torch.nn.functional.pad(row_offsets.diff(), (0, -R % PAIR_ROWS))
    exists_RP = 2 * torch.arange(P, device=counts.device) < counts.unsqueeze(1)
    walked = exists_RP.view(-(-R // PAIR_ROWS), PAIR_ROWS, P).transpose(1, 2).flatten().unsqueeze(0)
    (_, num_pairs), places = _compress(walked, capacity)
    group, pair, row = places // (PAIR_ROWS * P), places // PAIR_ROWS % P, places % PAIR_ROWS
    tiles = row_offsets[group * PAIR_ROWS + row] + 2 * pair
    used = torch.arange(capacity, device=counts.device) < num_pairs
    return torch.where(used, tiles, 0).to(torch.int32), num_pairs.view(1)


def _running_count(mask: Tensor) -> Tensor:
    """Number of true entries before each one, in row order."""
    count = mask.flatten().cumsum(0) - mask.flatten().long()
    return count.view(mask.shape)


def _compress(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(int32 offsets of each row's true entries, flat positions of the first `capacity` of them)."""
    counts = mask.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    flat = mask.flatten()
    slots = torch.where(flat, _running_count(mask).flatten(), capacity)
    positions = torch.zeros(capacity + 1, dtype=torch.long, device=mask.device)
    positions.scatter_(0, slots, torch.arange(flat.numel(), device=mask.device))
    return offsets, positions[:capacity]


def expert_topology(
    padded_offsets: Tensor, num_row_blocks: int, features_per_expert: int, block: tuple[int, int]
) -> Topology:
    """Block-diagonal topology of a mixture's hidden layer: tokens of expert e meet the features of expert e only.

    Args:
        padded_offsets: int32 [E + 1], first row of each expert, multiples of block[0] (MegaBlocks pads each expert's
            tokens to a whole tile; `expert_row_blocks` bounds the rows without reading the counts).
        num_row_blocks: row blocks of the token matrix; those past the last expert stay empty.
        features_per_expert: a multiple of block[1].
        block: rows and columns of a tile.

    Returns:
        Topology of num_row_blocks x (E * features / block[1]) blocks, at full capacity, built without waiting and
        without the mask that `from_mask` would read: a mixture makes one per layer and microbatch.

    Raises:
        ValueError: a feature count that is no multiple of the tile, or offsets of another kind.
    """
    check_block(block)
    if padded_offsets.dtype != torch.int32 or padded_offsets.dim() != 1:
        raise ValueError(f"padded_offsets: {padded_offsets.dtype} {list(padded_offsets.shape)}, expected int32 [E + 1]")
    if features_per_expert <= 0 or features_per_expert % block[1]:
        raise ValueError(f"features_per_expert={features_per_expert}: expected a positive multiple of {block[1]}")
    per_expert, R = features_per_expert // block[1], num_row_blocks
    capacity, first_E = R * per_expert, (padded_offsets // block[0]).long()
    height_E = first_E.diff()
    used_rows, tile = first_E[-1], torch.arange(capacity, device=padded_offsets.device)
    row, column = tile // per_expert, tile % per_expert
    expert = torch.searchsorted(first_E[1:].contiguous(), row, right=True).clamp(max=len(height_E) - 1)
    # In column order an expert's tiles take the places that they take in row order.
    place, height = tile - first_E[expert] * per_expert, height_E[expert].clamp(min=1)
    row_in_column = first_E[expert] + place % height
    order = row_in_column * per_expert + place // height
    rows, columns, order, rows_by_column = (
        torch.where(tile < used_rows * per_expert, index, 0).to(torch.int32)
        for index in (row, expert * per_expert + column, order, row_in_column)
    )
    height_C = height_E.repeat_interleave(per_expert, output_size=per_expert * len(height_E))
    column_offsets = torch.cat([height_C.new_zeros(1), height_C.cumsum(0)]).to(torch.int32)
    row_offsets = (torch.arange(R + 1, device=tile.device).clamp(max=used_rows) * per_expert).to(torch.int32)
    return Topology(
        block, row_offsets, column_offsets, rows, columns, order, rows_by_column,
        _longest(row_offsets, capacity), _longest(column_offsets, capacity),
        *_pairs_of_equal_rows(used_rows, per_expert, tile),
    )  # fmt: skip


def _pairs_of_equal_rows(used_rows: Tensor, per_row: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """`_pairs` where the first `used_rows` rows have `per_row` tiles each and the others none."""
    pairs_per_row = (per_row + 1) // 2
    group, in_group = index // (PAIR_ROWS * pairs_per_row), index % (PAIR_ROWS * pairs_per_row)
    rows_of_group = (used_rows - PAIR_ROWS * group).clamp(1, PAIR_ROWS)
    row, pair = PAIR_ROWS * group + in_group % rows_of_group, in_group // rows_of_group
    num_pairs = used_rows * pairs_per_row
    tiles = torch.where(index < num_pairs, row * per_row + 2 * pair, 0)
    return tiles.to(torch.int32), num_pairs.to(torch.int32).view(1)


def expert_row_blocks(num_tokens: int, num_experts: int, block_rows: int) -> int:
    """Row blocks that suffice for any split of `num_tokens` over experts padded to whole tiles."""
    return (num_tokens + num_experts * (block_rows - 1)) // block_rows


def check_blocks(name: str, size: int, blocks: int, block: int) -> None:
    """Refuse a dense operand whose `size` does not fill the topology's number of blocks."""
    have = -(-size // block)
    if have != blocks:
        raise ValueError(f"{name}: {size} rows or columns are {have} blocks of {block}, expected {blocks} blocks")
