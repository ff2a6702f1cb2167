"""Which node is bad?  Judges what the ranks measured by comparison with each other; no torch, plain data.

Absolute speeds depend on the machine, but in a job all nodes are alike: what is slower than a share of the median, or
differs from the majority, is the exception.  Speeds between nodes are measured in pairs of neighbours on a ring, so a
slow node shows in both of its pairs, a slow link in one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

T = TypeVar("T")

MIN_SHARE = 0.75
"""A rank, node or pair slower than this share of the median is bad."""
MAX_CLOCK_SKEW_S = 2.0
"""Clocks further apart than this make logs and file times misleading."""
MIN_FREE_MEMORY = 0.9
"""Share of a GPU's memory that must be free; less means that another process is there."""
MIN_FREE_DISK_BYTES = 5 * 2**30
"""Less room than this for checkpoints is a problem."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank found out about itself and its machine."""

    rank: int
    node: str
    device: str
    """Name of the device; equal everywhere."""
    gpus: int
    """GPUs that the process sees."""
    memory_bytes: int
    """The device's memory (of the machine, on a CPU)."""
    free_memory_bytes: int
    gemm_tflops: float
    """Matrix product in bf16 (GPU) or fp32 (CPU), TFLOP/s."""
    local_gigabytes_per_s: float | None
    """All-reduce within the node, bytes of the buffer over time; None for a node with one rank."""
    neighbours: dict[str, float]
    """GB/s of an all-reduce with the rank of the same number on neighbouring nodes, by node."""
    global_gigabytes_per_s: float
    """All-reduce over all ranks."""
    sums_right: bool
    """Whether every all-reduce gave the right sum."""
    clock_skew_s: float
    """This clock minus that of rank 0."""
    disk_megabytes_per_s: float
    """Writing to the shared folder with fsync; 0 if it cannot be written."""
    disk_free_bytes: int
    disk_problem: str
    """Why the shared folder is of no use to this node; empty if it is."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and packages."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a node."""

    node: str
    message: str


def find_problems(facts: Sequence[RankFacts], *, expected_gpus: int | None = None) -> list[Problem]:
    """All problems, node by node.

    Args:
        facts: one per rank, in their order.
        expected_gpus: GPUs of a node; None: as many as most nodes have.
    """
    problems: list[Problem] = []
    if expected_gpus is None:
        expected_gpus = _majority([fact.gpus for fact in facts])
    for name, title, unit in (("device", "device", ""), ("memory_bytes", "memory", " bytes")):
        usual = _majority([getattr(fact, name) for fact in facts])
        for fact in facts:
            # On CPUs the memory of machines of one kind differs by what firmware takes.
            if (value := getattr(fact, name)) != usual and not (name == "memory_bytes" and fact.gpus == 0):
                problems.append(Problem(fact.node, f"rank {fact.rank}: {title} {value}{unit}, elsewhere {usual}{unit}"))
    for fact in facts:
        problems += [Problem(fact.node, message) for message in _own_problems(fact, expected_gpus)]
    problems += _slow_ranks(facts) + _slow_nodes(facts) + _slow_pairs(facts) + _odd_versions(facts)
    return list(dict.fromkeys(problems))


def _own_problems(fact: RankFacts, expected_gpus: int) -> list[str]:
    found = []
    if fact.gpus != expected_gpus:
        found.append(f"{fact.gpus} GPUs instead of {expected_gpus}")
    if fact.gpus and fact.free_memory_bytes < MIN_FREE_MEMORY * fact.memory_bytes:
        used = (fact.memory_bytes - fact.free_memory_bytes) / 2**30
        found.append(f"rank {fact.rank}: {used:.1f} GiB of its GPU are taken by another process")
    if not fact.sums_right:
        found.append(f"rank {fact.rank}: an all-reduce gave a wrong sum")
    if abs(fact.clock_skew_s) > MAX_CLOCK_SKEW_S:
        found.append(f"the clock is {fact.clock_skew_s:+.1f} s from that of rank 0")
    if fact.disk_problem:
        found.append(fact.disk_problem)
    elif fact.disk_free_bytes < MIN_FREE_DISK_BYTES:
        found.append(f"only {fact.disk_free_bytes / 2**30:.1f} GiB are free in the shared folder")
    return found


def _slow_ranks(facts: Sequence[RankFacts]) -> list[Problem]:
    usual = median(fact.gemm_tflops for fact in facts)
    # CPUs share their cores with others: there only a rank at a third of the speed says something.
    share = {fact.rank: MIN_SHARE if fact.gpus else MIN_SHARE / 2 for fact in facts}
    return [
        Problem(fact.node, f"rank {fact.rank}: matrix products at {fact.gemm_tflops:.3g} TFLOP/s, median {usual:.3g}")
        for fact in facts
        if fact.gemm_tflops < share[fact.rank] * usual
    ]


def _slow_nodes(facts: Sequence[RankFacts]) -> list[Problem]:
    rates: dict[str, float] = {}
    for fact in facts:
        if fact.local_gigabytes_per_s and fact.gpus:
            rates[fact.node] = min(fact.local_gigabytes_per_s, rates.get(fact.node, fact.local_gigabytes_per_s))
    if len(rates) < 2:
        return []
    usual = median(rates.values())
    return [
        Problem(node, f"all-reduce within the node at {rate:.3g} GB/s, median {usual:.3g}")
        for node, rate in rates.items()
        if rate < MIN_SHARE * usual
    ]


def _slow_pairs(facts: Sequence[RankFacts]) -> list[Problem]:
    """With three or more nodes, a node all of whose pairs are slow; otherwise both ends of the slow pair."""
    pairs: dict[frozenset[str], float] = {}
    for fact in facts:
        for other, rate in fact.neighbours.items():
            if fact.gpus:
                key = frozenset((fact.node, other))
                pairs[key] = min(rate, pairs.get(key, rate))
    if len(pairs) < 2:
        return []
    usual = median(pairs.values())
    slow = {pair for pair, rate in pairs.items() if rate < MIN_SHARE * usual}
    nodes = sorted({node for pair in slow for node in pair})
    guilty = [node for node in nodes if all(pair in slow for pair in pairs if node in pair)]
    return [
        Problem(node, f"all-reduce with {_other(pair, node)} at {pairs[pair]:.3g} GB/s, median {usual:.3g}")
        for pair in sorted(slow, key=sorted)
        for node in (sorted(pair & set(guilty)) or sorted(pair))
    ]


def _other(pair: frozenset[str], node: str) -> str:
    return next(iter(pair - {node}), node)


def _odd_versions(facts: Sequence[RankFacts]) -> list[Problem]:
    problems = []
    for package in sorted({package for fact in facts for package in fact.versions}):
        found = [fact.versions.get(package, "not installed") for fact in facts]
        usual = _majority(found)
        for fact, version in zip(facts, found, strict=True):
            if version != usual:
                problems.append(Problem(fact.node, f"{package} is {version}, elsewhere {usual}"))
    return problems


def _majority(values: Sequence[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def render_report(facts: Sequence[RankFacts], problems: Sequence[Problem]) -> str:
    """A table with one line per node, and the problems below it."""
    nodes = list(dict.fromkeys(fact.node for fact in facts))
    bad = {problem.node for problem in problems}
    rows = [["node", "ranks", "device", "TFLOP/s", "node GB/s", "pair GB/s", "clock", "disk MB/s", "verdict"]]
    for node in nodes:
        mine = [fact for fact in facts if fact.node == node]
        pair = [rate for fact in mine for rate in fact.neighbours.values()]
        local = mine[0].local_gigabytes_per_s
        rows.append(
            [
                *(node, str(len(mine)), mine[0].device, f"{min(fact.gemm_tflops for fact in mine):.3g}"),
                *(f"{local:.3g}" if local else "-", f"{min(pair):.3g}" if pair else "-"),
                f"{mine[0].clock_skew_s:+.3f} s",
                f"{min(fact.disk_megabytes_per_s for fact in mine):.0f}",
                "BAD" if node in bad else "ok",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"all-reduce over all {len(facts)} ranks: {min(f.global_gigabytes_per_s for f in facts):.3g} GB/s")
    lines += [f"BAD {problem.node}: {problem.message}" for problem in problems]
    lines.append(f"preflight failed on {', '.join(sorted(bad))}" if bad else "preflight passed")
    return "\n".join(lines)
