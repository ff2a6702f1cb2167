"""Block-sparse products against dense float64 products of the same tiles; integer forms bit for bit.

A bfloat16 result rounds each element by at most 2^-8 of it.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.block_sparse import dds, dsd, sdd
from kernels.grouped_reference import dense_from_tiles, tiles_from_dense
from kernels.grouped_wgrad import pad_offsets
from kernels.tile_launch import TileConfig
from kernels.topology import PAIR_ROWS, Topology, expert_row_blocks, expert_topology, from_mask

SMALL = TileConfig(32, 32, 16, num_warps=4, num_stages=2, group_m=2)
BF16_ROUNDING = 2**-8
# (row blocks, column blocks, density, tile, features of the dense operand)
CASES = [
    (5, 7, 0.4, (32, 32), 112),
    (8, 3, 0.5, (16, 64), 136),
    (1, 1, 1.0, (64, 32), 24),
    (4, 6, 0.0, (32, 16), 48),
]
LARGE_CASES = [(16, 24, 0.3, (128, 128), 1024), (9, 8, 0.5, (128, 256), 2048)]


def randoms(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int, device: str, kind: str = "normal", seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=randoms(seed + sum(shape)))
    if kind == "heavy":
        values = values.sign() * values.abs().pow(6)
    return (values * (kind != "zero")).to(torch.bfloat16).to(device)


def integers(low: int, high: int, *shape: int, device: str) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=randoms(sum(shape))).to(device)


def topologies(device: str) -> list[tuple[Topology, int, int, dict[str, TileConfig]]]:
    """(topology, tiles in use, features, options), each at its exact and at a larger capacity."""
    found = []
    for R, C, density, block, features in CASES + (LARGE_CASES if device == "cuda" else []):
        mask = (torch.rand(R, C, generator=randoms(R)) < density).to(device)
        options = {} if block[0] >= 128 else {"config": SMALL}
        for capacity in (None, R * C):
            found.append((from_mask(mask, block, capacity=capacity), int(mask.sum()), features, options))
    return found


def tiles(topology: Topology, used: int, *, device: str, kind: str = "normal") -> tuple[Tensor, Tensor]:
    """(values with NaN in the tiles that are not in use, the dense matrix in float64)."""
    values = torch.full((topology.capacity, *topology.block), torch.nan, dtype=torch.bfloat16, device=device)
    values[:used] = floats(used, *topology.block, device=device, kind=kind)
    dense = dense_from_tiles(
        values[:used].double(), topology.rows[:used], topology.columns[:used], topology.block, topology.grid
    )
    return values, dense


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got.float()).all()
    norm = want.norm()
    return float((got.double() - want).norm() / (norm if norm > 0 else 1.0))


def test_topology_indexes_the_mask_in_both_orders(device: str) -> None:
    for R, C, density, block, _ in CASES:
        mask = (torch.rand(R, C, generator=randoms(R)) < density).to(device)
        used = int(mask.sum())
        for capacity in (used, R * C):
            topology = from_mask(mask, block, capacity=capacity)
            assert (topology.grid, topology.capacity) == ((R, C), capacity)
            assert topology.shape == (R * block[0], C * block[1])
            rows, columns = mask.nonzero(as_tuple=True)
            assert torch.equal(topology.rows[:used].long(), rows)
            assert torch.equal(topology.columns[:used].long(), columns)
            assert topology.row_offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
            assert topology.column_offsets.tolist() == [0, *mask.sum(0).cumsum(0).tolist()]
            by_column, by_row = mask.t().nonzero(as_tuple=True)
            order = topology.order[:used].long()
            assert torch.equal(rows[order], by_row) and torch.equal(columns[order], by_column)
            assert torch.equal(topology.rows_by_column[:used].long(), by_row)


def test_topology_drops_what_exceeds_its_capacity(device: str) -> None:
    topology = from_mask(torch.ones(2, 3, dtype=torch.bool, device=device), (16, 16), capacity=4)
    assert topology.row_offsets.tolist() == [0, 3, 4]
    assert topology.column_offsets.tolist() == [0, 2, 3, 4]
    assert topology.order.tolist() == [0, 3, 1, 2]


def test_expert_topology_is_block_diagonal(device: str) -> None:
    offsets = torch.tensor([0, 0, 256, 384], dtype=torch.int32, device=device)
    topology = expert_topology(offsets, 4, 512, (128, 256))
    assert topology.grid == (4, 6) and topology.capacity == 8
    assert topology.row_offsets.tolist() == [0, 2, 4, 6, 6]  # the fourth block of rows belongs to no expert
    assert topology.columns[:6].tolist() == [2, 3, 2, 3, 4, 5]
    assert expert_row_blocks(300, 3, 128) == 5  # 1 + 1 + 298 tokens fill 1 + 1 + 3 blocks


@pytest.mark.parametrize("features", [32, 96, 128])
@pytest.mark.parametrize("blocks", [(0, 0), (5,), (3, 0, 21, 1), (0, 16, 16, 0, 7), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_expert_topology_is_that_of_its_mask(device: str, blocks: tuple[int, ...], features: int) -> None:
    per_expert, R = features // 32, sum(blocks) + 2
    expert_R = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))
    mask = torch.zeros(R, len(blocks) * per_expert, dtype=torch.bool)
    mask[: len(expert_R)] = expert_R.unsqueeze(1) == torch.arange(mask.shape[1]) // per_expert
    offsets = torch.tensor([0, *blocks], device=device).cumsum(0).mul(32).to(torch.int32)
    got = expert_topology(offsets, R, features, (32, 32))
    want = from_mask(mask.to(device), (32, 32), capacity=R * per_expert)
    for name, index in vars(want).items():
        same = torch.equal(getattr(got, name), index) if isinstance(index, Tensor) else getattr(got, name) == index
        assert same, (name, getattr(got, name), index)


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero"])
@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_sdd(device: str, kind: str, layout: str) -> None:
    for topology, used, K, options in topologies(device):
        M, N = topology.shape[0] - 5, topology.shape[1] - 8  # the last blocks reach beyond the operands
        a, b = floats(M, K, device=device, kind=kind), floats(K, N, device=device, kind=kind, seed=1)
        stored = b if layout == "kn" else b.t().contiguous()
        got = sdd(a, stored, topology, b_layout=layout, **options)[:used]
        padded = torch.zeros(topology.shape, dtype=torch.float64, device=device)
        padded[:M, :N] = a.double() @ b.double()
        want = tiles_from_dense(padded, topology.rows[:used], topology.columns[:used], topology.block)
        assert error(got, want) < BF16_ROUNDING


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero"])
@pytest.mark.parametrize("form", ["S", "S^T"])
def test_dsd(device: str, kind: str, form: str) -> None:
    for topology, used, N, options in topologies(device):
        values, dense = tiles(topology, used, device=device, kind=kind)
        left = dense if form == "S" else dense.t()
        b = floats(left.shape[1], N, device=device, kind=kind, seed=1)
        for stored, layout in ((b, "kn"), (b.t().contiguous(), "nk")):
            got = dsd(values, stored, topology, form=form, b_layout=layout, **options)
            assert error(got, left @ b.double()) < BF16_ROUNDING


@pytest.mark.parametrize("kind", ["normal", "heavy", "zero"])
@pytest.mark.parametrize("form", ["S", "S^T"])
def test_dds(device: str, kind: str, form: str) -> None:
    for topology, used, M, options in topologies(device):
        values, dense = tiles(topology, used, device=device, kind=kind)
        right = dense if form == "S" else dense.t()
        a = floats(M - 3, right.shape[0], device=device, kind=kind, seed=1)
        assert error(dds(a, values, topology, form=form, **options), a.double() @ right) < BF16_ROUNDING


def test_integer_forms_are_the_reference_bit_for_bit(device: str) -> None:
    for topology, used, features, options in topologies(device):
        options = {name: replace(config, block_k=32) for name, config in options.items()}
        (M, N), K = topology.shape, features // 16 * 16
        rows, columns = topology.rows[:used], topology.columns[:used]
        a_scale, b_scale = (torch.rand(size, generator=randoms(size)).to(device) + 0.01 for size in (M, N))
        codes, ternary = integers(-128, 128, M, K, device=device), integers(-1, 2, N, K, device=device)
        got = sdd(codes, ternary, topology, b_layout="nk", a_scale_M=a_scale, b_scale_N=b_scale, **options)
        want = _linear(codes, ternary, a_scale, b_scale)
        assert torch.equal(got[:used], tiles_from_dense(want, rows, columns, topology.block))

        if topology.block[1] < 32:  # the sums of the other two run over the columns of a tile
            continue
        values = integers(-128, 128, topology.capacity, *topology.block, device=device)
        dense = dense_from_tiles(values[:used], rows, columns, topology.block, topology.grid)
        weight, scale = integers(-1, 2, 48, N, device=device), b_scale[:1].expand(48).contiguous()
        got = dsd(values, weight, topology, b_layout="nk", row_scale_M=a_scale, column_scale_N=scale, **options)
        assert torch.equal(got, _linear(dense, weight, a_scale, scale))
        got = dds(weight, values, topology, form="S^T", row_scale_M=scale, column_scale_N=a_scale, **options)
        assert torch.equal(got, _linear(weight, dense, scale, a_scale))


def _linear(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return reference.linear(x, weight, x_scale_T1=x_scale[:, None], weight_scale_O=weight_scale, dtype=torch.bfloat16)


def test_a_mixtures_feed_forward_and_its_gradients(device: str) -> None:
    """Two layers with ReLU through the expert topology, forward and backward, against one expert after the other."""
    D, F, block, counts = 48, 64, (32, 32), [40, 0, 1]
    padded = torch.tensor([0, 64, 64, 96], dtype=torch.int32, device=device)  # whole tiles of 32 rows
    topology = expert_topology(padded, expert_row_blocks(41, 3, 32), F, block)
    up, down = floats(3 * F, D, device=device), floats(3 * F, D, device=device, seed=1)
    x = torch.zeros(topology.shape[0], D, dtype=torch.bfloat16, device=device)
    grad = torch.zeros_like(x)
    want = {name: torch.zeros(*shape, dtype=torch.float64, device=device) for name, shape in
            {"y": x.shape, "dx": x.shape, "dup": up.shape, "ddown": down.shape}.items()}  # fmt: skip
    for expert, count in enumerate(counts):
        rows = slice(int(padded[expert]), int(padded[expert]) + count)
        features = slice(expert * F, (expert + 1) * F)
        x[rows], grad[rows] = floats(count, D, device=device), floats(count, D, device=device, seed=2)
        xe, we, ve = (t.double().requires_grad_() for t in (x[rows], up[features], down[features]))
        ye = (xe @ we.t()).relu() @ ve
        ye.backward(grad[rows].double())
        want["y"][rows], want["dx"][rows] = ye.detach(), xe.grad
        want["dup"][features], want["ddown"][features] = we.grad, ve.grad
    hidden = sdd(x, up, topology, b_layout="nk", config=SMALL).relu()
    d_hidden = sdd(grad, down, topology, b_layout="nk", config=SMALL) * (hidden > 0)
    got = {
        "y": dsd(hidden, down, topology, config=SMALL),
        "dx": dsd(d_hidden, up, topology, config=SMALL),
        "dup": dsd(d_hidden, x, topology, form="S^T", config=SMALL),
        "ddown": dsd(hidden, grad, topology, form="S^T", config=SMALL),
    }
    for name, value in got.items():
        assert error(value, want[name]) < 2 * BF16_ROUNDING, name  # hidden and result are rounded


def test_bad_arguments(device: str) -> None:
    topology = from_mask(torch.ones(2, 3, dtype=torch.bool, device=device), (16, 32))
    a, b = floats(32, 64, device=device), floats(64, 96, device=device)
    values = floats(6, 16, 32, device=device)
    with pytest.raises(ValueError, match=r"a_MK: 48 rows or columns are 3 blocks of 16, expected 2 blocks"):
        sdd(floats(48, 64, device=device), b, topology)
    with pytest.raises(ValueError, match=r"a_MK: dtype torch.float32, expected torch.bfloat16 or torch.int8"):
        sdd(a.float(), b, topology)
    with pytest.raises(ValueError, match=r"b: shape \[64, 96\], expected \[any, 64\]"):
        sdd(a, b, topology, b_layout="nk")
    with pytest.raises(ValueError, match=r'b_layout=\'nm\': expected "kn" or "nk"'):
        sdd(a, b, topology, b_layout="nm")
    with pytest.raises(ValueError, match=r'contiguous along the sum: expected b_layout="nk"'):
        sdd(a.to(torch.int8), b.to(torch.int8), topology)
    with pytest.raises(ValueError, match=r"a_scale_M: given, expected with int8 operands only"):
        sdd(a, b, topology, a_scale_M=torch.ones(32, device=device))
    with pytest.raises(ValueError, match=r"values: shape \[5, 16, 32\], expected \[6, 16, 32\]"):
        dsd(values[:5], b.t().contiguous(), topology)
    with pytest.raises(ValueError, match=r"values: dtype torch.float16, expected torch.bfloat16"):
        dds(a, values.half(), from_mask(topology_mask(4, 3, device), (16, 32), capacity=6))
    with pytest.raises(ValueError, match=r"block_k=64: expected a divisor of the sparse operand's block, 32"):
        dsd(values, b.t().contiguous(), topology, config=TileConfig(block_k=64))
    narrow = from_mask(topology_mask(2, 2, device), (32, 16), capacity=4)
    codes = torch.zeros(4, 32, 16, dtype=torch.int8, device=device)
    weight, one = torch.zeros(48, 32, dtype=torch.int8, device=device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"block_k=16: expected at least 32 with int8 operands"):
        dsd(codes, weight, narrow, b_layout="nk", row_scale_M=one, column_scale_N=one[:48].clone())
    with pytest.raises(ValueError, match=r'form=\'T\': expected "S" or "S\^T"'):
        dds(a, values, topology, form="T")
    with pytest.raises(ValueError, match=r"block=\(48, 16\): expected powers of two"):
        from_mask(topology_mask(1, 1, device), (48, 16))
    with pytest.raises(ValueError, match=r"mask_RC: torch.int64 of 2 dimensions, expected torch.bool of 2"):
        from_mask(topology_mask(1, 1, device).long(), (16, 16))
    with pytest.raises(ValueError, match=r"capacity=7: expected 0 to 6"):
        from_mask(topology_mask(2, 3, device), (16, 16), capacity=7)
    with pytest.raises(ValueError, match=r"features_per_expert=100: expected a positive multiple of 32"):
        expert_topology(pad_offsets(torch.zeros(3, dtype=torch.int32, device=device)), 4, 100, (16, 32))


def topology_mask(rows: int, columns: int, device: str) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device)


def test_pairs_cover_each_row_of_tiles_and_advance_through_groups_of_rows(device: str) -> None:
    mask = torch.rand(PAIR_ROWS + 9, 12, generator=randoms(3)) < 0.4
    mask[4] = False
    for capacity in (None, mask.numel(), 60):
        topology = from_mask(mask.to(device), (128, 128), capacity=capacity)
        offsets = topology.row_offsets.tolist()
        starts = [(row, tile) for row, line in enumerate(pairwise(offsets)) for tile in range(*line, 2)]
        want = sorted(starts, key=lambda pair: (pair[0] // PAIR_ROWS, pair[1] - offsets[pair[0]], pair[0]))
        assert topology.pairs[: int(topology.num_pairs)].tolist() == [tile for _, tile in want]
        assert not topology.pairs[len(want) :].any()


def test_longest_lines_come_first_and_empty_ones_read_past_the_tiles(device: str) -> None:
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool, device=device)
    for capacity in (5, 9):
        topology = from_mask(mask, (16, 16), capacity=capacity)
        assert topology.longest_rows.tolist() == [[1, 0, 2], [2, 0, capacity], [3, 2, 1]]
        assert topology.longest_columns.tolist() == [[1, 3, 0, 2], [1, 3, 0, capacity], [2, 2, 1, 1]]
