"""Where the ranks of a hung run stand, and which of them the others wait for.  No torch: reports are plain data.

Each rank describes itself by a `Position`; `judge` compares them.  A rank is to blame, in this order, if it
1. left no report: its process is stopped, gone or cannot run Python, or its machine is unreachable;
2. has called fewer collectives of a process group than another member of it (torch's flight recorder numbers them);
3. stands outside of a collective while others wait in one.
If none does, all of them wait: then the network between them is the suspect, and the report says who waits where.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Position:
    """Where one rank stands."""

    rank: int
    host: str
    phase: str
    """What the trainer was doing: start, step, evaluation, checkpoint or end."""
    step: int
    """Optimizer step in flight."""
    seconds: float
    """Time since the last sign of progress."""
    place: str
    """Innermost line of our own code on the main thread's stack, `file:line function`."""
    collective: str | None = None
    """The operation that it waits in; None if it is not in one."""
    called: Mapping[str, int] = field(default_factory=dict)
    """Collectives called so far, by process group."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; `Position(**data)` is its inverse."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What is wrong, and the report for people."""

    stuck: tuple[int, ...]
    """Ranks that the others wait for; empty if nobody in particular."""
    summary: str
    """One line."""
    text: str
    """All lines."""


def judge(positions: Sequence[Position | None]) -> Verdict:
    """Compare the ranks of a run.

    Args:
        positions: one per rank; None for a rank that left no report.
    """
    known = [position for position in positions if position is not None]
    silent = tuple(rank for rank, position in enumerate(positions) if position is None)
    stuck = silent or _behind(known) or _outside(known)
    waiting = [position for position in known if position.rank not in stuck]
    lines = [_describe(position, "stuck:") for position in known if position.rank in stuck]
    if silent:
        lines.append(f"stuck: {ranks_text(silent)} left no report: stopped, gone, or its machine is unreachable")
    if not stuck:
        lines.append("stuck: nobody in particular; all ranks wait, which points to the network between them")
    lines += _group(waiting)
    summary = "; ".join(line.removeprefix("stuck: ") for line in lines[: max(1, len(stuck))] if "stuck:" in line)
    waits = next((position.collective for position in waiting if position.collective), None)
    if stuck and waits:
        summary += f"; the others wait in {waits}"
    return Verdict(stuck, summary, "\n".join(lines))


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _behind(positions: Sequence[Position]) -> tuple[int, ...]:
    """Ranks that have called fewer collectives of some group than its other members."""
    most: dict[str, int] = {}
    for position in positions:
        for group, count in position.called.items():
            most[group] = max(most.get(group, 0), count)
    behind = {p.rank for p in positions for group, count in p.called.items() if count < most[group]}
    # A rank that is behind but waits itself is a victim, e.g. of a later pipeline stage.
    free = {p.rank for p in positions if p.rank in behind and p.collective is None}
    return tuple(sorted(free or behind))


def _outside(positions: Sequence[Position]) -> tuple[int, ...]:
    outside = tuple(position.rank for position in positions if position.collective is None)
    return outside if len(outside) < len(positions) else ()


def _group(positions: Sequence[Position]) -> list[str]:
    """One line per place, with all ranks that wait there."""
    places: dict[tuple[str, str, int, str | None], list[int]] = {}
    for p in positions:
        places.setdefault((p.place, p.phase, p.step, p.collective), []).append(p.rank)
    return [
        f"waiting: {ranks_text(ranks)} in {collective or 'no collective'}, {place} ({phase} {step})"
        for (place, phase, step, collective), ranks in places.items()
    ]


def _describe(position: Position, title: str) -> str:
    where = f"in {position.collective} at {position.place}" if position.collective else f"at {position.place}"
    return f"{title} rank {position.rank} on {position.host} {where} ({position.phase} {position.step})"
