"""Progress of a long command: a bar on a terminal, one JSON line every few seconds otherwise."""

import json
import time
from types import TracebackType
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.data.parallel import Counts

_ALWAYS = ("documents", "tokens", "bytes")


class StageProgress:
    """Shows documents/s, tokens/s and the time left of one stage.

    Args:
        stage: Name of the stage.
        total_bytes: Bytes the stage will go through; None if unknown.
        stream: Where to show it.
        measure: Which count runs up to `total_bytes`.
        interval: Seconds between JSON lines.
    """

    def __init__(
        self,
        stage: str,
        *,
        total_bytes: int | None,
        stream: TextIO,
        measure: Literal["bytes", "input_bytes"] = "bytes",
        interval: float = 5.0,
    ) -> None:
        self._stage = stage
        self._total = total_bytes
        self._stream = stream
        self._measure = measure
        self._interval = interval
        self._done = Counts()
        self._start = self._last = time.monotonic()
        self._bar = _make_bar(stream) if stream.isatty() else None
        self._task = self._bar.add_task(stage, total=total_bytes, rates="") if self._bar else None

    def __enter__(self) -> "StageProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._write_line(finished=True)

    def update(self, counts: Counts) -> None:
        """Add what was done since the last call."""
        self._done = Counts(*(before + new for before, new in zip(self._done, counts, strict=True)))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._completed(), rates=self._rates())
        elif time.monotonic() - self._last >= self._interval:
            self._write_line(finished=False)

    @property
    def done(self) -> Counts:
        """Everything so far."""
        return self._done

    def _completed(self) -> int:
        return self._done.input_bytes if self._measure == "input_bytes" else self._done.bytes

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _rates(self) -> str:
        seconds = self._seconds()
        rates = f"{self._done.documents / seconds:,.0f} documents/s"
        return rates + (f"  {self._done.tokens / seconds:,.0f} tokens/s" if self._done.tokens else "")

    def _write_line(self, *, finished: bool) -> None:
        seconds = self._seconds()
        self._last = time.monotonic()
        record = {
            "stage": self._stage,
            "finished": finished,
            **{name: count for name, count in self._done._asdict().items() if count or name in _ALWAYS},
            "total_bytes": self._total,
            "seconds": round(seconds, 1),
            "documents_per_s": round(self._done.documents / seconds),
            "tokens_per_s": round(self._done.tokens / seconds),
        }
        if self._total and (completed := self._completed()) and not finished:
            record["eta_s"] = round(seconds * max(self._total - completed, 0) / completed, 1)
        print(json.dumps(record), file=self._stream, flush=True)


def _make_bar(stream: TextIO) -> Progress:
    stage, rates = TextColumn("{task.description:<8}"), TextColumn("{task.fields[rates]}")
    return Progress(
        stage, BarColumn(), TaskProgressColumn(), rates, TimeRemainingColumn(), console=Console(file=stream)
    )
