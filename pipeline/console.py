"""What rank 0 prints while it trains: one screen at the start, one line per record, one panel at the end.

    step   120/2000  loss 5.1234  grad 0.812  lr 1.50e-03   12.3k tok/s  mem 1.20 GiB  mfu 12.3%  zeros 40.0% ...

A step line takes the very mapping that goes to metrics.jsonl and MLflow, so the three cannot disagree.  On a
terminal the lines are coloured and a progress bar stays below them; in a file or a pipe they are plain single lines
that grep and a pager take.  With `log_file` everything is also written to the run's own log.  Ranks other than 0
hold a console that prints nothing, so callers need no `if rank == 0`.
"""

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.start_screen import LayerGroup, ParallelGrid, StartScreen, count, gibibytes, group_layers, render

__all__ = ["LayerGroup", "ParallelGrid", "RunConsole", "StartScreen", "Summary", "group_layers"]

PLAIN_WIDTH = 120
REFRESH_SECONDS = 0.25
_logger = logging.getLogger("pipeline")
Part = tuple[str, str, str]  # label, value, style of the value


@dataclass(frozen=True)
class Summary:
    """The final panel.

    Attributes:
        state: completed, stopped or failed.
        reason: One sentence, as in status.json.
        step: Optimizer steps done.
        tokens: Tokens trained on in this start.
        seconds: Wall time of this start.
        vocab_size: Token ids of the model; ln of it is the loss of a uniform guess.
        run_directory: Where everything is.
        val_loss: Held-out cross-entropy in nats per token; None if never measured.
        sample: Generated text; empty if none.
        tracking: How to see the run in MLflow; empty without tracking.
        undelivered: Values that MLflow does not have.
        first_step: Steps done before this start.
    """

    state: str
    reason: str
    step: int
    tokens: int
    seconds: float
    vocab_size: int
    run_directory: Path
    val_loss: float | None = None
    sample: str = ""
    tracking: str = ""
    undelivered: int = 0
    first_step: int = 0


class RunConsole:
    """Printer of one process.  Use it as a context manager, so that the progress bar is taken down on an error.

    Args:
        total_steps: Optimizer steps of the run.
        rank: Global rank; all but 0 print nothing.
        stream: Where to print; absent: standard output.
        log_file: Also append everything there as plain text.
    """

    def __init__(
        self, total_steps: int, *, rank: int = 0, stream: TextIO | None = None, log_file: Path | None = None
    ) -> None:
        self._total_steps = total_steps
        self._consoles: list[Console] = []
        self._log: TextIO | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._refreshed = 0.0
        self._handler = _ConsoleHandler(self)
        if rank != 0:
            return
        _logger.addHandler(self._handler)
        self._consoles.append(_console(sys.stdout if stream is None else stream))
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_file.open("a", buffering=1, encoding="utf-8")
            self._consoles.append(_console(self._log))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, screen: StartScreen) -> None:
        """Print the start-up screen and, on a terminal, put up the progress bar."""
        self._print(render(screen))
        if self._consoles and self._consoles[0].is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._consoles[0], auto_refresh=False, transient=True)
            self._task = self._progress.add_task("", total=self._total_steps, completed=screen.resumed_step or 0)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` optimizer steps; cheap enough for every step."""
        if self._progress is not None:
            now = time.monotonic()
            refresh = now - self._refreshed >= REFRESH_SECONDS
            self._refreshed = now if refresh else self._refreshed
            self._progress.update(self._task, completed=step, refresh=refresh)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step line.

        Args:
            step: Optimizer steps done.
            metrics: The record as written to metrics.jsonl; what it lacks (MFU, sparsity) is left out of the line.
        """
        self._line(step, step_parts(metrics, self._total_steps - step))

    def evaluation(self, step: int, val_loss: float, seconds: float) -> None:
        """Print the line of a held-out evaluation: loss in nats per token and the time it took."""
        loss = ("val loss", f"{val_loss:7.4f}", _loss_style(val_loss))
        ratio = ("perplexity", f"{perplexity(val_loss):.2f}", "cyan")
        self._line(step, [loss, ratio, ("took", f"{seconds:.1f} s", "")])

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Print the line of a checkpoint that is complete."""
        self._line(step, [("checkpoint", str(path), "green"), ("took", f"{seconds:.1f} s", "")])

    def message(self, text: str, *, style: str = "") -> None:
        """Print a line of text above the progress bar."""
        self._print(Text(printable(text), style=style))

    def finish(self, summary: Summary) -> None:
        """Take down the progress bar and print the final panel."""
        self._stop_progress()
        colour = {"completed": "green", "stopped": "yellow"}.get(summary.state, "red")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in _summary_lines(summary):
            table.add_row(name, value)
        title = Text(f"{summary.state}: {summary.reason}" if summary.reason else summary.state, style=f"bold {colour}")
        self._print(Panel(table, title=title, border_style=colour))

    def close(self) -> None:
        """Take down the progress bar and close the log file; closing twice is fine."""
        self._stop_progress()
        _logger.removeHandler(self._handler)
        if self._log is not None:
            self._consoles.pop()
            self._log.close()
            self._log = None

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, step: int, parts: list[Part]) -> None:
        width = len(str(self._total_steps))
        line = Text(f"step {step:>{width}}/{self._total_steps}", style="bold")
        for label, value, style in parts:
            line.append("  ")
            line.append(f"{label} " if label else "", style="not bold dim")
            line.append(value, style=f"not bold {style}")
        self._print(line)

    def _print(self, renderable: RenderableType) -> None:
        for console in self._consoles:
            # soft_wrap: a step line stays one line in a file, whatever width is assumed for it.
            console.print(renderable, soft_wrap=isinstance(renderable, Text))


class _ConsoleHandler(logging.Handler):
    """What this package logs goes where the step lines go, and does not tear the progress bar."""

    def __init__(self, console: RunConsole) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.message(self.format(record), style=style)


def step_parts(metrics: Mapping[str, float], steps_left: int) -> list[Part]:
    """(label, value, style) of a step line; metrics that the record lacks are left out."""

    def parts() -> Iterator[Part]:
        for name, label, form, style in _STEP_COLUMNS:
            if name in metrics:
                value = metrics[name]
                yield label, _format(form, value), "bold red" if not math.isfinite(value) else style
        if "perf/step_seconds" in metrics and math.isfinite(metrics["perf/step_seconds"]):
            yield "eta", duration(steps_left * metrics["perf/step_seconds"]), ""

    return list(parts())


# metric, label, format (`count` and `gib` are ours), style; widths keep the columns of successive lines aligned
_STEP_COLUMNS = (
    ("train/loss", "loss", "7.4f", "cyan"),
    ("train/grad_norm", "grad", "6.3f", "magenta"),
    ("train/lr", "lr", "8.2e", ""),
    ("perf/tokens_per_second", "", "count", "green"),
    ("mem/peak_bytes", "mem", "gib", "yellow"),
    ("perf/mfu_dense_bf16", "mfu", "5.1%", "green"),
    ("qsparse/sparsity", "zeros", "5.1%", "blue"),
    ("qsparse/ternary_zeros", "ternary zeros", "5.1%", "blue"),
    ("moe/imbalance", "imbalance", "5.2f", "yellow"),
)


def _format(form: str, value: float) -> str:
    if not math.isfinite(value):
        return f"{value:>7}"
    if form == "count":
        return f"{count(value):>6} tok/s"
    if form == "gib":
        return f"{gibibytes(value):>9}"
    return format(value, form)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf if loss == loss else math.nan


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front where there are any."""
    return str(timedelta(seconds=round(seconds)))


def printable(text: str) -> str:
    """`text` without control characters, which a half-trained model may well produce."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _summary_lines(summary: Summary) -> Iterator[tuple[str, str]]:
    speed = f", {count(summary.tokens / summary.seconds)} tokens/s" if summary.seconds > 0 else ""
    steps = f"{summary.step - summary.first_step:,} steps"
    steps += f" (to step {summary.step:,})" if summary.first_step else ""
    yield "trained", f"{steps}, {count(summary.tokens)} tokens in {duration(summary.seconds)}{speed}"
    if summary.val_loss is not None:
        uniform = math.log(summary.vocab_size)
        reached = f"loss {summary.val_loss:.4f} nats per token, perplexity {perplexity(summary.val_loss):.2f}"
        yield "held-out", f"{reached} (a uniform guess: {uniform:.4f} = ln {summary.vocab_size})"
    if summary.sample:
        yield "sample", printable(summary.sample)
    yield "run", str(summary.run_directory)
    if summary.tracking:
        yield "mlflow", summary.tracking
    if summary.undelivered:
        yield "not in mlflow", f"{summary.undelivered:,} values; qsparse track sync {summary.run_directory}"


def _loss_style(loss: float) -> str:
    return "bold cyan" if math.isfinite(loss) else "bold red"


def _console(stream: TextIO) -> Console:
    # No markup: generated text and config values may hold square brackets.
    plain = not stream.isatty()
    return Console(file=stream, width=PLAIN_WIDTH if plain else None, markup=False, emoji=False, highlight=False)
