"""Honest timing on one GPU: variants take turns, medians with quartiles, a table that says where it was measured.

Clocks and temperature drift within seconds, so timing one variant after the other compares two states of the chip as
much as two programs.  Here each round times every variant once, by CUDA events around enough calls to fill a
millisecond.  `unit_rates` measures, in the same process, what large dense products reach: the floor of any product is
its operations over that rate.
"""

import csv
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

Variant = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds per call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float


def measure(variants: dict[str, Variant], *, rounds: int = 15, fill_ms: float = 1.0) -> dict[str, Timing]:
    """Time each variant in every round; the first call of each compiles and is not counted."""
    calls = {}
    for name, variant in variants.items():
        variant()
        calls[name] = max(1, math.ceil(fill_ms / _time(variant, 2)))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            samples[name].append(_time(variant, calls[name]))
    return {name: Timing(statistics.median(times), *_quartiles(times)) for name, times in samples.items()}


def runnable(variants: dict[str, Variant]) -> dict[str, Variant]:
    """Those of other libraries' `variants` that run here; the others are named with their error and left out."""
    found = {}
    for name, variant in variants.items():
        try:
            variant()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            print(f"  {name} does not run here: {type(error).__name__}: {str(error)[:200]}")
            continue
        found[name] = variant
    return found


def _time(variant: Variant, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        variant()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _quartiles(times: list[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4)
    return low, high


def unit_rates(size: int = 8192) -> dict[str, float]:
    """Operations per second of dense size^3 products by the vendor's libraries: bf16, int8, fp8."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = (torch.randint(-127, 128, (size, size), device="cuda", dtype=torch.int8) for _ in range(2))
    one = torch.ones((), device="cuda")
    af, bf = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    variants: dict[str, Variant] = {
        "bf16": lambda: a @ b.t(),
        "int8": lambda: torch._int_mm(a8, b8.t()),
        "fp8": lambda: torch._scaled_mm(af, bf.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
    }
    return {name: 2 * size**3 / (timing.median * 1e-3) for name, timing in measure(variants, rounds=5).items()}


def environment() -> str:
    """GPU and versions, for the head of a table."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def require_gpu() -> None:
    """Leave with a message where no CUDA GPU is present."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark times CUDA kernels, and no CUDA GPU is present")


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows of equal keys, with the environment as the last column."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "environment"])
        writer.writeheader()
        writer.writerows({**row, "environment": environment()} for row in rows)
