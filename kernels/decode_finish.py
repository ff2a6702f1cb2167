"""How the programs of a decode product meet, in Triton: before the first load and after the last sum.

Integer sums travel by atomic addition, exact in any order.  Each addition also adds 2^count_shift, more than any sum,
and so counts the arrivals in the upper bits of the same word: whoever finds all others counted has the complete sum in
hand, stores the output, and leaves zero for the next launch.  The obvious ways are a counter behind a memory fence, two
more round trips to the second-level cache, or a second kernel, a launch.  `arrived_last` is that counter, for float
sums, whose order must not depend on who comes first.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """Let the programs of the next launch start now (they wait here), then wait for the previous kernel's results."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def add_and_finish(sums_ptr, y_ptr, at, sums, scale, wanted, count_shift, programs):
    """Add integer sums; where they were the last of `programs`, store sum * scale and leave zero.

    Every sum of any of the programs lies in [-2^count_shift / 2, 2^count_shift / 2).
    """
    one = 1 << count_shift
    before = tl.atomic_add(sums_ptr + at, sums + one, mask=wanted, sem="relaxed")
    last = wanted & (((before + (one >> 1)) >> count_shift) == programs - 1)
    complete = before - (programs - 1) * one + sums
    tl.store(sums_ptr + at, tl.zeros_like(sums), mask=last)
    tl.store(y_ptr + at, (complete.to(tl.float32) * scale).to(y_ptr.dtype.element_ty), mask=last)


@triton.jit
def arrived_last(arrivals_ptr, programs):
    """Whether all `programs` have stored their part; resets the counter for the next launch."""
    tl.debug_barrier()  # every thread's stores come before the program's arrival
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last
