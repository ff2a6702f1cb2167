"""Gate, then time: no section prints a speed unless all its cases agree with their references."""

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.console import Console

from pipeline.bench.kernels.case import Case, Check, Contest, Options, Outcome, Section, Sweepable
from pipeline.bench.kernels.timing import Rates, Timing, copy, measure, runnable, side_stream

COPY = "copy"


def run_section(
    section: Section,
    options: Options,
    rates: Rates,
    console: Console,
    wanted: str = "",
    save: Callable[[list[dict[str, object]]], None] = lambda rows: None,
) -> Outcome:
    """Check all cases whose names contain `wanted`; if all agree, time them.

    An error while timing ends its case; the rows measured until then are kept.

    Args:
        section: what to run.
        options: device, size and time.
        rates: of this machine.
        console: where checks and times appear as they are made.
        wanted: part of a case's name; empty takes all.
        save: takes all rows so far, after each case: what comes may be killed.
    """
    begin = time.monotonic()
    if section.measure is not None:
        return section.measure(options, wanted)
    cases = {name: build for name, build in section.cases(options).items() if wanted in name}
    if section.compile is not None:
        _call_in_threads(section.compile(options, wanted))
    failures = [failure for name, build in cases.items() for failure in _gate(name, build, console)]
    if failures:
        return Outcome([], failures)
    _say(console, f"checked in {time.monotonic() - begin:.0f} s")
    rows: list[dict[str, object]] = []
    for name, build in cases.items():
        if time.monotonic() - begin > options.seconds:
            _say(console, f"{name} is left out: {options.seconds:g} seconds are over")
            continue
        try:
            for row in _time(name, build, options, rates, console):
                rows.append(row)
        except Exception as error:  # what was measured until then is not lost
            failures.append(f"{name}: timing broke off: {type(error).__name__}: {str(error)[:300]}")
            console.print_exception()
        _free()
        save(rows)
    _say(console, f"done in {time.monotonic() - begin:.0f} s")
    return Outcome(rows, failures)


def _call_in_threads(calls: Iterable[Callable[[], object]]) -> None:
    """One thread per core; an error will come again where it is reported."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.exception()
    _free()


def sweep_section(section: Section, options: Options, console: Console, wanted: str = "") -> None:
    """Time the launches that the cases want compared (`Sweepable`), and print them, fastest first."""
    for name, build in section.cases(options).items():
        if wanted not in name:
            continue
        case = build()
        if not isinstance(case, Sweepable):
            continue
        for contest in case.launches():
            found, absent = runnable(contest.variants)
            for launch, reason in absent.items():
                _say(console, f"{name}, {contest.operation}: {launch} is left out: {reason}")
            for launch, timing in sorted(measure(found).items(), key=lambda item: item[1].median):
                _say(console, f"{name}, {contest.operation}: {timing.median:10.2f} us  {launch}")


def _gate(name: str, build: Callable[[], Case], console: Console) -> Iterator[str]:
    checks: list[Check] = []
    try:
        checks.extend(build().checks())
    except Exception as error:  # a kernel that does not run is as wrong as one that errs
        checks.append(Check(f"{type(error).__name__}: {str(error)[:300]}", float("inf"), 0.0))
    if not checks:
        checks.append(Check("nothing was compared", float("inf"), 0.0))
    for check in checks:
        text = f"{name}: {check.what}: error {check.error:.2e}, bound {check.bound:.2e}"
        if not check.passed:
            yield text
            _say(console, f"wrong: {text}", style="red")
    passed = sum(check.passed for check in checks)
    _say(console, f"{name}: {passed} of {len(checks)} checks passed")
    _free()


def _time(
    name: str, build: Callable[[], Case], options: Options, rates: Rates, console: Console
) -> Iterator[dict[str, object]]:
    case = build()
    for contest in case.contests(rates):
        stream = side_stream()
        rivals, absent = runnable(contest.rivals, stream)
        for rival, reason in absent.items():
            _say(console, f"{name}, {contest.operation}: {rival} is left out: {reason}")
        variants = dict(contest.variants) | rivals
        if contest.copy_bytes:
            variants[COPY] = copy(contest.copy_bytes, options.device)
        timings = measure(variants, rounds=5 if options.quick else 9, stream=stream)
        for row in _rows(name, contest, timings):
            line = f"{row['median_us']:>10} us  {row['speedup'] or '':>7}  {row['variant']}"
            _say(console, f"{name}, {contest.operation}: {line}")
            yield row
        del variants, rivals
        _free()


def _rows(name: str, contest: Contest, timings: Mapping[str, Timing]) -> Iterator[dict[str, object]]:
    base = timings[contest.baseline].median if contest.baseline in timings else None
    for variant, timing in timings.items():
        floor = timings[COPY].median if COPY in timings else contest.floors.get(variant)
        yield {
            "case": name,
            "operation": contest.operation,
            "variant": variant,
            "median_us": f"{timing.median:.2f}",
            "q25_us": f"{timing.low:.2f}",
            "q75_us": f"{timing.high:.2f}",
            "floor_us": "" if floor is None else f"{floor:.2f}",
            "baseline": contest.baseline if base else "",
            "speedup": "" if base is None else f"{base / timing.median:.3f}",
            "timed": timing.how,
        }


def _say(console: Console, text: str, *, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
