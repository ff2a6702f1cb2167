"""`fused` for tokens sorted by expert: each token is normalized with the SubLN gain of its expert, in one launch.

    a = activation(gate, up)      x = a / sqrt(mean(a^2) + eps) * gain[e]      codes, scale = sparsify(x)

Without a gain a token's expert does not matter, and `fused` itself serves.  The obvious ways are a launch per expert,
for which the host must know the token counts, or a gain per token, gathered into a tensor as large as the activations.
Here each token looks for its expert among the offsets, which stay on the device.

The gradient of the gains is a sum over each expert's tokens in a fixed order and without atomics.  Program p walks the
p-th run of consecutive tokens, and of each expert e that it meets it leaves a partial sum in line p + e: from one such
pair to the next p or e grows and neither shrinks, so no two pairs share a line and P + E lines suffice.

Shapes: T tokens, F features behind the activation, E experts, P programs.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Activation
from kernels.fused import MAX_FEATURES, Sparsified, check_input, fuse_row, fused_options
from kernels.fused_backward import norm_launch, norm_row, row_piece, store_pieces
from kernels.grouped_gradients import expert_of
from kernels.launch import INTERPRETED, check_rows, multiprocessors
from kernels.sparsify import check_kept, quarters
from kernels.tile_launch import check_same_device, check_tensor, loop_bound, stored_dtype

_CHUNK = 2048


@triton.jit
def _fused_kernel(
    x_ptr, gain_EF, offsets_E1, codes_ptr, scale_ptr, rstd_ptr, row_stride, features, quarter, kept, eps,
    E: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SPARSE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One token, as `fused._fused_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    gain_ptr = gain_EF + expert_of(offsets_E1, tl.program_id(0), E, EXPERTS).to(tl.int64) * features
    fuse_row(
        x_ptr + row * row_stride, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, row, features, quarter, kept, eps,
        ROWS, COLUMNS, BLOCK, SPARSE, ACTIVATION, True,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, gain_EF, rstd_ptr, offsets_E1, out_ptr, partial_LF, num_rows, run, grad_stride, x_stride, features,
    E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One run of tokens; a row in four pieces of BLOCK columns, as `fused_backward._norm_kernel`."""
    program = tl.program_id(0)
    begin = program * run
    stop = tl.minimum(begin + run, num_rows)
    halves: tl.constexpr = 1 if ACTIVATION == "" or ACTIVATION == "relu2" else 2
    grad_ptr += begin.to(tl.int64) * grad_stride
    x_ptr += begin.to(tl.int64) * x_stride
    out_ptr += begin.to(tl.int64) * features * halves
    column0 = tl.arange(0, BLOCK)
    column1, column2, column3 = column0 + BLOCK, column0 + 2 * BLOCK, column0 + 3 * BLOCK
    first = expert_of(offsets_E1, begin, E, EXPERTS)
    last = expert_of(offsets_E1, stop - 1, E, EXPERTS)
    for expert in range(loop_bound(first, INTERPRET), loop_bound(last + 1, INTERPRET)):
        gain_ptr = gain_EF + expert * features
        dgain0 = tl.zeros([BLOCK], tl.float32)
        dgain1, dgain2, dgain3 = dgain0, dgain0, dgain0
        start = tl.maximum(tl.load(offsets_E1 + expert), begin)
        end = tl.minimum(tl.load(offsets_E1 + expert + 1), stop)
        for token in range(loop_bound(start, INTERPRET), loop_bound(end, INTERPRET)):
            at = token - begin
            dgain0, dgain1, dgain2, dgain3 = norm_row(
                grad_ptr + at * grad_stride, x_ptr + at * x_stride, gain_ptr, out_ptr + at * features * halves,
                tl.load(rstd_ptr + token), features, column0, column1, column2, column3,
                dgain0, dgain1, dgain2, dgain3, ACTIVATION,
            )  # fmt: skip
        line_ptr = partial_LF + (program + expert) * features
        store_pieces(line_ptr, features, column0, column1, column2, column3, dgain0, dgain1, dgain2, dgain3)


@triton.jit
def _sum_kernel(partial_LF, offsets_E1, dgain_EF, run, features, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """dgain of one expert: the lines of the programs that met it."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    start, end = tl.load(offsets_E1 + expert), tl.load(offsets_E1 + expert + 1)
    total = tl.zeros([BLOCK], tl.float32)
    if start < end:
        for program in range(loop_bound(start // run, INTERPRET), loop_bound((end - 1) // run + 1, INTERPRET)):
            total += tl.load(partial_LF + (program + expert) * features + column, mask=mask, other=0.0)
    tl.store(dgain_EF + expert * features + column, total.to(dgain_EF.dtype.element_ty), mask=mask)


def sparsify(
    x: Tensor,
    kept: int | None,
    block: int | None = None,
    *,
    offsets: Tensor,
    activation: Activation | None,
    gain_EF: Tensor,
    eps: float,
) -> Sparsified:
    """`fused.sparsify` with a gain per expert.

    Args:
        x: [T, F] bf16 sorted by expert, or with a gated activation [T, 2 F].
        kept: as in `fused.sparsify`.
        block: as in `fused.sparsify`.
        offsets: int32 [E + 1], first row of each expert and T at the end.
        activation: what precedes the norm; None: nothing.
        gain_EF: bf16 or float32.
        eps: added to the mean square.

    Raises:
        ValueError: dtype, shape, K or M that the kernel does not take.
    """
    rows, features = check_input(x, activation)
    check_kept(kept, block, features)
    E = _check_gains(gain_EF, offsets, features, rows)
    codes = torch.empty(len(rows), features, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(scale)
    if codes.numel():
        quarter, lines, columns = quarters(features, block if kept is not None else None)
        _fused_kernel[(len(rows),)](
            rows, gain_EF, offsets, codes, scale, rstd, rows.stride(0), features, quarter, kept or 0, eps,
            E=E, EXPERTS=triton.next_power_of_2(E), ROWS=lines, COLUMNS=columns,
            BLOCK=block if block and kept is not None else 0,
            SPARSE=kept is not None and kept < (block or features), ACTIVATION=activation or "",
            **fused_options(lines * columns, activation, norm=True),
        )  # fmt: skip
    return Sparsified(codes, scale, rstd)


def backward(
    grad: Tensor, x: Tensor, *, offsets: Tensor, activation: Activation | None, gain_EF: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the gains of `sparsify`.

    Args:
        grad: [T, F] bf16, gradient of the dequantized input of the down projection.
        x: input of the forward pass.
        offsets: as in the forward pass.
        activation: as in the forward pass.
        gain_EF: as in the forward pass.
        rstd: [T, 1] float32 that the forward pass returned.

    Returns:
        dx in the shape of `x`, and dgain [E, F] in the type of `gain_EF`, zeros for an expert without tokens.

    Raises:
        ValueError: dtype or shape that the kernels do not take.
    """
    rows, features = check_input(x, activation)
    grads = check_rows(grad, "grad", MAX_FEATURES, (torch.bfloat16,))
    E = _check_gains(gain_EF, offsets, features, rows)
    if grads.shape != (len(rows), features):
        raise ValueError(f"grad: shape {tuple(grad.shape)}, an x of {tuple(x.shape)} takes {(len(rows), features)}")
    check_tensor("rstd", rstd, dtype=torch.float32, shape=(len(rows), 1))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, torch.zeros_like(gain_EF)
    launch = norm_launch(features)
    run = triton.cdiv(len(rows), launch.programs * multiprocessors(x.device))
    programs = triton.cdiv(len(rows), run)
    partial = torch.empty(programs + E, features, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grads, rows, gain_EF, rstd, offsets, dx, partial, len(rows), run, grads.stride(0), rows.stride(0), features,
        E=E, EXPERTS=triton.next_power_of_2(E), BLOCK=row_piece(features), ACTIVATION=activation or "",
        INTERPRET=INTERPRETED, num_warps=launch.num_warps, maxnreg=None if INTERPRETED else launch.registers,
    )  # fmt: skip
    dgain = torch.empty(gain_EF.shape, dtype=stored_dtype(gain_EF.dtype), device=x.device)
    _sum_kernel[(E, triton.cdiv(features, _CHUNK))](
        partial, offsets, dgain, run, features, BLOCK=min(_CHUNK, triton.next_power_of_2(features)),
        INTERPRET=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return dx, dgain.to(gain_EF.dtype)


def _check_gains(gain_EF: Tensor, offsets: Tensor, features: int, rows: Tensor) -> int:
    """Number of experts."""
    check_tensor("gain_EF", gain_EF, dtype=(torch.bfloat16, torch.float32), shape=(None, features))
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(len(gain_EF) + 1,))
    check_same_device(x=rows, gain_EF=gain_EF, offsets=offsets)
    return len(gain_EF)
