"""Honest timing: variants take turns, replayed from CUDA graphs; medians with quartiles.

Clocks and temperature drift within seconds, so timing one variant after the other compares two states of the chip as
much as two programs.  Here each round times every variant once.  A variant's calls are recorded in a CUDA graph, since
otherwise Python's launches are what a short kernel is measured by; what cannot be recorded is called, which is said
(`Timing.how`).  Enough calls to fill a millisecond or two stand between two events.

On a CPU, where only the tests run this, calls are timed by the clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch

Call = Callable[[], object]
Variant = Call | Sequence[Call]
"""Something to time; of several calls (the same work on other operands, so that no cache helps) the mean counts."""


class Timing(NamedTuple):
    """Microseconds per call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    how: Literal["graph", "calls"]
    """Replayed from a CUDA graph, or called from Python, launches included."""


_CALLS_FILL = 8


class _Prepared(NamedTuple):
    run: Call
    calls: int
    how: Literal["graph", "calls"]


def side_stream() -> torch.cuda.Stream | None:
    """A stream to record graphs on; None on a CPU."""
    return torch.cuda.Stream() if torch.cuda.is_available() else None


def measure(
    variants: Mapping[str, Variant],
    *,
    rounds: int = 9,
    fill_us: float = 1500.0,
    stream: torch.cuda.Stream | None = None,
    graphs: bool = True,
) -> dict[str, Timing]:
    """Time each variant in every round.

    Args:
        variants: by name; every one must run.
        rounds: times that each is timed.
        fill_us: microseconds that one timing should take at least.
        stream: that graphs are recorded on.  Autograd runs a backward on the stream of its forward, so a variant that
            was called before must have been called on this one.
        graphs: try to record; False where the variants wait for the host or for each other.
    """
    stream = stream or side_stream()
    prepared = {name: _prepare(variant, fill_us, stream, graphs) for name, variant in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    for number in range(rounds + 1):
        for name, one in prepared.items():
            elapsed = _elapsed_us(one.run) / one.calls
            if number:  # the first round warms up
                samples[name].append(elapsed)
    return {name: _timing(samples[name], prepared[name].how) for name in prepared}


def _timing(samples: list[float], how: Literal["graph", "calls"]) -> Timing:
    low, median, high = quartiles(samples)
    return Timing(median, low, high, how)


def quartiles(samples: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of one sample it alone."""
    return statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * list(samples)


def _prepare(variant: Variant, fill_us: float, stream: torch.cuda.Stream | None, graphs: bool) -> _Prepared:
    calls = list(variant) if isinstance(variant, Sequence) else [variant]
    synchronize()

    def once() -> None:
        for call in calls:
            call()

    with torch.cuda.stream(stream):
        once()
        once()
        estimate = _elapsed_us(once)

    def prepared(fill_us: float) -> tuple[Call, int]:
        repeats = min(64, max(1, math.ceil(fill_us / estimate)))

        def repeat() -> None:
            for _ in range(repeats):
                once()

        return repeat, repeats * len(calls)

    run, count = prepared(fill_us)
    graph = _record(run, stream) if graphs else None
    if graph is None:  # the device waits for the first launch: with more calls that weighs less
        return _Prepared(*prepared(_CALLS_FILL * fill_us), "calls")
    return _Prepared(graph.replay, count, "graph")


def _record(run: Call, stream: torch.cuda.Stream | None) -> torch.cuda.CUDAGraph | None:
    if stream is None:
        return None
    synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _elapsed_us(run: Call) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def runnable(
    variants: Mapping[str, Variant], stream: torch.cuda.Stream | None = None
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Variants that run here, and why the others do not; they are called on `stream`."""
    found, absent = {}, {}
    for name, variant in variants.items():
        first = variant[0] if isinstance(variant, Sequence) else variant
        synchronize()
        try:
            with torch.cuda.stream(stream):
                first()
            synchronize()
        except Exception as error:  # other people's code: whatever it raises is the reason why it is absent
            absent[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
        else:
            found[name] = variant
    return found, absent


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy(num_bytes: int, device: torch.device | str) -> Call:
    """A copy that moves `num_bytes` in all, half read and half written: the floor of what must move as many.

    Whole lines of 512 bytes: PyTorch copies others in a slower way.
    """
    source = torch.randint(0, 256, (max(1, num_bytes // 1024) * 512,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Rates:
    """What the chip reached in this run; the floor of a product is its operations over the rate of its unit."""

    def __init__(self, device: torch.device | str, size: int = 8192) -> None:
        self._device, self._size = device, size

    @cached_property
    def bytes_per_us(self) -> float:
        """Bytes read and written per microsecond by a large copy."""
        num_bytes = 16 * self._size**2
        return num_bytes / measure({"copy": copy(num_bytes, self._device)}, rounds=5)["copy"].median

    @cached_property
    def operations_per_us(self) -> dict[str, float]:
        """Operations per microsecond of dense square products by the vendor's libraries: bf16, int8, fp8."""
        shape, device = (self._size, self._size), self._device
        a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        a8, b8 = (torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for _ in range(2))
        one = torch.ones((), device=device)
        af, bf = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        products, _ = runnable(
            {
                "bf16": lambda: a @ b.t(),
                "int8": lambda: torch._int_mm(a8, b8.t()),
                "fp8": lambda: torch._scaled_mm(af, bf.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
            }
        )
        timings = measure(products, rounds=5)
        return {name: 2 * self._size**3 / timing.median for name, timing in timings.items()}
