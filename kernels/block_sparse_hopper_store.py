"""How the block-sparse kernels for Hopper store a tile while the next one is multiplied.

A tile of S^T B may sum as little as four steps, so its store must not stop the tensor cores.  Once summed, a tile
becomes pairs of bfloat16 in registers (a quarter of all registers, which these kernels have to spare), and its halves
leave through shared memory during the first two steps of the next tile.  The other way, a second group of warps with
sums of its own, halves the tile and so reads the operands twice as often.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma


@gluon.jit
def halves(values):
    """Left and right columns of float32 [M, N], as int32 [M, N / 4]: two neighbours in bfloat16 each.

    Triton keeps a bfloat16 that outlives a loop in a register of its own, a pair in one.
    """
    M: gl.constexpr = values.shape[0]
    N: gl.constexpr = values.shape[1]
    even, odd = values.reshape([M, N // 2, 2]).split()
    pairs = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )
    return pairs.reshape([M, 2, N // 4]).permute(0, 2, 1).split()


@gluon.jit
def _send(pairs, c_desc, c_tile, row, column):
    """Pairs of bfloat16 through shared memory to the result."""
    layout: gl.constexpr = gl.NVMMASharedLayout(c_desc.layout.swizzle_byte_width, 32, 2)
    tma.store_wait(0)
    c_tile._reinterpret(gl.int32, pairs.type.shape, layout).store(pairs)
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [row, column], c_tile)


@gluon.jit
def nothing_waits(zero, SHAPE: gl.constexpr, layout: gl.constexpr):
    """What waits before the first tile; `waiting` is, for the left and the right half: pairs, row, column, whether."""
    left, right = halves(gl.zeros(SHAPE, gl.float32, layout))
    return left, zero, zero, zero != 0, right, zero, zero, zero != 0


@gluon.jit
def send_waiting(waiting, step, steps, c_desc, c_tile):
    """In the first step of a tile the left half of the one before, in the second step (of one: the same) the right."""
    left, left_row, left_column, has_left, right, right_row, right_column, has_right = waiting
    if has_left & (step == 0):
        _send(left, c_desc, c_tile, left_row, left_column)
    if has_right & (step == gl.minimum(steps, 2) - 1):
        _send(right, c_desc, c_tile, right_row, right_column)


@gluon.jit
def scales(scale_ptr, places, size):
    """float32 scales at `places`, 0 beyond `size`."""
    return gl.load(scale_ptr + places, mask=places < size, other=0.0)
