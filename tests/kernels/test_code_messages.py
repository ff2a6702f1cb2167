"""Messages of ternary codes against their documented bits, and Triton's form of them against PyTorch's."""

import pytest
import torch
from torch import Tensor

from kernels import code_messages_triton
from kernels.code_messages import CodeMessages

COUNTS = [[7], [64, 64], [100, 0, 33, 257], [1000, 4096, 2047]]


def codes(count: int) -> Tensor:
    return torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int8)


def test_a_field_is_where_the_layout_says() -> None:
    messages = CodeMessages([200, 40], torch.device("cpu"))
    assert messages.num_bytes == 64  # 50 bytes, rounded up to 16
    given = codes(200)
    packed = messages.pack(given)
    for index, code in enumerate(given.tolist()):
        field, byte = divmod(index, 64)
        assert (int(packed[byte]) >> (2 * field)) & 3 == code % 4
    assert (packed[8:] >> 6).count_nonzero() == 0  # fields of codes that there are not


@pytest.mark.parametrize("counts", COUNTS)
def test_all_pieces_arrive_next_to_each_other(counts: list[int], device: str) -> None:
    messages = CodeMessages(counts, torch.device(device))
    pieces = [codes(count).to(device) for count in counts]
    packed = torch.stack([messages.pack(piece) for piece in pieces])
    out = torch.full((sum(counts),), 99, dtype=torch.int8, device=device)
    messages.unpack(packed, out)
    assert torch.equal(out, torch.cat(pieces))


@pytest.mark.parametrize("counts", COUNTS)
def test_tritons_messages_are_the_same(counts: list[int], device: str) -> None:
    cpu = CodeMessages(counts, torch.device("cpu"))
    pieces = [codes(count) for count in counts]
    packed = [code_messages_triton.pack(piece.to(device), cpu.num_bytes) for piece in pieces]
    for found, piece in zip(packed, pieces, strict=True):
        assert torch.equal(found.cpu(), cpu.pack(piece))
    starts = torch.tensor([0, *counts]).cumsum(0)
    for is_aligned in {False, not any(start % 16 for start in starts.tolist())}:
        out = torch.full((sum(counts) + 1,), 99, dtype=torch.int8, device=device)
        code_messages_triton.unpack(torch.stack(packed), starts.to(device), out[:-1], is_aligned=is_aligned)
        assert torch.equal(out[:-1].cpu(), torch.cat(pieces))
        assert out[-1] == 99


def test_other_types_and_sizes_are_refused() -> None:
    messages = CodeMessages([10, 20], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"codes are torch.int8 \[65\], a message takes at most 64 int8"):
        messages.pack(codes(65))
    with pytest.raises(ValueError, match=r"codes are torch.int32"):
        messages.pack(codes(10).int())
    packed = torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"messages are torch.uint8 \[1, 16\], expected uint8 \[2, 16\]"):
        messages.unpack(packed[:1], codes(30))
    with pytest.raises(ValueError, match=r"out is torch.int8 \[31\], expected int8 \[30\]"):
        messages.unpack(packed, codes(31))


def test_fields_of_a_long_message_lie_beyond_what_32_bits_count(device: str) -> None:
    """4 GB of codes in 1 GB of message: of 16 codes, all are in the first field."""
    given = codes(16).to(device)
    message = torch.full((2048,), 99, dtype=torch.uint8, device=device)
    code_messages_triton._pack_kernel[(1,)](given, message, 16, 1_000_000_000, BLOCK=2048, num_warps=4)
    assert torch.equal(message[:16], (given & 3).to(torch.uint8)) and not message[16:].any()
