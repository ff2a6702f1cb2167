"""What the grouped and the block-sparse matrix products share: tile shapes, argument checks, two in-kernel helpers.

Tiles travel through Hopper's bulk copy engine (TMA): a descriptor made on the host names the matrix, the kernel asks
for a tile by its corner, and the engine fills what lies outside the matrix with zeros.  The obvious way, pointers and
masks, costs registers and address arithmetic in every thread.  The price is alignment: the first byte and the rows of
each operand start on 16-byte boundaries, so odd feature counts are refused here instead of running slowly.

On a CPU the same kernels run in Triton's interpreter (TRITON_INTERPRET=1), which needs three concessions: it multiplies
the bit patterns of bfloat16 tiles (`dot_tiles` widens them), it truncates instead of rounding to bfloat16 (results are
stored as float32 and rounded by PyTorch), and under NumPy 2.4 it cannot read a loop bound that is a tensor.
"""

# mypy: disable-error-code="no-untyped-def"
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gemm import has_hopper_kernel
from kernels.launch import ALIGNMENT, INTERPRETED

HOPPER_STEP_BYTES = 128
"""Bytes of each operand's row that `grouped_hopper` multiplies in one step."""


@dataclass(frozen=True)
class TileConfig:
    """Shape of one program's work; every field is a tuning knob and none changes an integer result.

    `group_m` row tiles are walked before the next column tile, so that the second-level cache keeps their operands.
    `persistent` launches `programs_per_sm` programs per multiprocessor, each looping over tiles; otherwise each
    possible tile gets a program, and those beyond the device-side count leave at once.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 4
    group_m: int = 8
    persistent: bool = True
    programs_per_sm: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size > 256 or size & (size - 1):
                raise ValueError(f"{name}={size}: tiles are powers of two from 16 to 256")

    def num_programs(self, device: torch.device, most: int) -> int:
        """Programs to launch when at most `most` tiles exist."""
        if not self.persistent:
            return most
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
        return min(most, processors * self.programs_per_sm)


@dataclass(frozen=True)
class HopperTile:
    """Shape of one program's work in `grouped_hopper`; no field changes an integer result.

    A step of the sum is 128 bytes of each operand, and `stages` of them fill the ring of slots.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    warps: int = 8
    group_m: int = 8
    programs_per_sm: int = 1


def chosen_tile(
    config: TileConfig | HopperTile | None, portable: TileConfig, result_columns: int, device: torch.device
) -> TileConfig | HopperTile:
    """`config`; absent, the Hopper kernel where it runs and can write whole 16 bytes of bfloat16, else `portable`."""
    if config is not None:
        return config
    return HopperTile() if has_hopper_kernel(device) and result_columns % 8 == 0 else portable


@triton.jit
def loop_bound(count, INTERPRET: tl.constexpr):
    """`count` itself; under the interpreter the Python integer in it."""
    if INTERPRET:
        return int(count.handle.data.item())
    else:
        return count


@triton.jit
def dot_tiles(a_MK, b_KN, accumulator_MN, WIDEN: tl.constexpr):
    """accumulator + a b; WIDEN: bfloat16 as float32, for the interpreter."""
    if WIDEN:
        a_MK = a_MK.to(tl.float32)
        b_KN = b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, accumulator_MN, out_dtype=accumulator_MN.dtype)


@triton.jit
def swizzle(tile, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """(row, column) of the `tile`-th tile when GROUP_M rows advance together through the columns."""
    width = GROUP_M * column_tiles
    first_row = (tile // width) * GROUP_M
    rows = tl.minimum(row_tiles - first_row, GROUP_M)
    within = tile % width
    return first_row + within % rows, within // rows


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which a kernel stores a result of `dtype`."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def launch_options(operand: Tensor, config: TileConfig) -> dict[str, Any]:
    """Compile-time arguments that every kernel with tiles of `operand` takes."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "WIDEN": INTERPRETED and operand.dtype == torch.bfloat16,
        "INTERPRET": INTERPRETED,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Descriptor of `matrix` (leading dimensions flattened into rows) for tiles [rows, columns]."""
    return TensorDescriptor.from_tensor(matrix.reshape(-1, matrix.shape[-1]), [rows, columns])


def check_tensor(
    name: str, tensor: Tensor, *, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> None:
    """Refuse a tensor of another dtype or shape (None: any size), or one that is not contiguous.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()} are not contiguous; call .contiguous() first")


def check_operand(
    name: str, tensor: Tensor, *, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> None:
    """`check_tensor`, and the 16-byte alignment that the bulk copy engine asks of the base address and of each row."""
    check_tensor(name, tensor, dtype=dtype, shape=shape)
    unit = ALIGNMENT // tensor.element_size()
    if tensor.shape[-1] == 0 or tensor.shape[-1] % unit:
        raise ValueError(f"{name}: last dimension {tensor.shape[-1]}, expected a positive multiple of {unit} elements")
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name}: address {tensor.data_ptr():#x} is not a multiple of {ALIGNMENT} bytes")


def check_same_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on several devices, and CPU tensors outside of the interpreter."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"operands on several devices: {listing}; expected one")
    if next(iter(devices.values())).type != "cuda" and not INTERPRETED:
        raise ValueError(f"{next(iter(devices))} on the CPU: expected CUDA tensors, or TRITON_INTERPRET=1 for tests")


def check_choice(name: str, value: str, first: str, second: str) -> None:
    """Refuse a value that is neither `first` nor `second`."""
    if value not in (first, second):
        raise ValueError(f'{name}={value!r}: expected "{first}" or "{second}"')
