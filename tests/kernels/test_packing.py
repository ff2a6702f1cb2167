"""Packed ternary weights against a packing written out entry by entry."""

import pytest
import torch

from kernels.packing import Layout, check_packed, pack_ternary, unpack_ternary, words_per_row

LAYOUTS: tuple[Layout, ...] = ("column", "row")
SIZES = [(1, 1), (63, 100), (256, 257), (100, 63), (1000, 33)]


def ternary(out_features: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_features * 1009 + in_features)
    return torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_unpacking_inverts_packing(sizes: tuple[int, int], layout: Layout, device: str) -> None:
    weight_OD = ternary(*sizes).to(device)
    assert torch.equal(unpack_ternary(pack_ternary(weight_OD, layout=layout)), weight_OD)


def field(words: torch.Tensor, row: int, entry: int, *, units_per_word: int) -> int:
    """Two bits of an entry, from the formula: field p of unit u holds entry p U + u."""
    units = words.shape[1] * units_per_word
    plane, unit = divmod(entry, units)
    shift = (unit % units_per_word) * (32 // units_per_word) + 2 * plane
    return (int(words[row, unit // units_per_word]) >> shift) & 3


@pytest.mark.parametrize("sizes", [(300, 5), (5, 300)])
def test_layouts_are_the_documented_bits(sizes: tuple[int, int]) -> None:
    weight_OD = ternary(*sizes)
    columns, rows = (pack_ternary(weight_OD, layout=layout).words for layout in LAYOUTS)
    for o, d in torch.cartesian_prod(torch.arange(sizes[0]), torch.arange(sizes[1])).tolist():
        weight = int(weight_OD[o, d])
        assert field(columns, d, o, units_per_word=1) == weight + 1
        assert field(rows, o, d, units_per_word=4) == weight % 4


def test_padding_is_weight_zero() -> None:
    weight_OD = torch.ones(3, 2, dtype=torch.int8)
    columns, rows = (pack_ternary(weight_OD, layout=layout).words for layout in LAYOUTS)
    assert [field(columns, 0, entry, units_per_word=1) for entry in range(256)] == [2] * 3 + [1] * 253
    assert [field(rows, 0, entry, units_per_word=4) for entry in range(256)] == [1] * 2 + [0] * 254


def test_bytes_of_a_large_weight_are_a_quarter_of_its_entries() -> None:
    packed = pack_ternary(ternary(512, 1024), layout="column")
    assert packed.num_bytes == 512 * 1024 // 4
    assert [words_per_row(codes) for codes in (1, 256, 257, 4096, 14336)] == [16, 16, 32, 256, 896]


def test_mistakes_name_the_argument_and_the_value() -> None:
    weight_OD = ternary(8, 8)
    with pytest.raises(ValueError, match=r"weight_OD: dtype torch\.float32, expected torch\.int8"):
        pack_ternary(weight_OD.float(), layout="row")
    with pytest.raises(ValueError, match="layout: 'diagonal', expected 'column' or 'row'"):
        pack_ternary(weight_OD, layout="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_OD: holds 2, expected ternary codes"):
        pack_ternary(torch.full((2, 2), 2, dtype=torch.int8), layout="row")
    with pytest.raises(ValueError, match="at least one row and one column"):
        pack_ternary(weight_OD[:0].contiguous(), layout="row")
    with pytest.raises(ValueError, match=r"w: layout 'row', expected 'column'"):
        check_packed("w", pack_ternary(weight_OD, layout="row"), "column")
