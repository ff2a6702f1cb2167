"""The memory that the other tests' tensors lie in."""

import faulthandler
import multiprocessing
import signal

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.guard import GuardedMemory


@triton.jit
def _copy_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < count), mask=at < count)
    else:
        tl.store(out_ptr + at, tl.load(x_ptr + at), mask=at < count)


def _copy(count: int, masked: bool) -> None:
    x = torch.randn(count)
    out = torch.empty_like(x)
    assert out.isnan().all()
    _copy_kernel[(1,)](x, out, count, BLOCK=64, MASKED=masked)
    assert torch.equal(out, x)


def _copy_without_mask() -> None:
    faulthandler.disable()
    with GuardedMemory():
        _copy(60, masked=False)


def test_a_kernel_that_reads_behind_its_input_ends_the_process(device: str) -> None:
    if device == "cuda":
        pytest.skip("a GPU has compute-sanitizer")
    for count in (64, 60, 7):
        _copy(count, masked=True)
    process = multiprocessing.get_context("spawn").Process(target=_copy_without_mask)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGSEGV


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.int64])
def test_values_views_and_gradients_stay(dtype: torch.dtype, device: str) -> None:
    x = torch.arange(24, device=device).to(dtype).view(4, 6)
    assert x.t()[1].tolist() == [1, 7, 13, 19]
    x[1:, ::2] += 1
    assert x.sum().item() == 276 + 9
    weight = torch.ones(3, requires_grad=True, device=device)
    (weight * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0, 2.0, 2.0]
