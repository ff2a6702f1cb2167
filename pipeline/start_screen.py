"""What a run says once, before its first step: enough to notice a wrong layout or a wrong recipe while it is cheap.

The screen shows only what differs from the defaults, groups layers of identical format, and draws the rank grid in
megatron-core's order, tensor parallel fastest, then context, data and pipeline parallel:

    rank = tp + TP (cp + CP (dp + DP pp))

Dataclasses of plain values in, rich renderables out: nothing here asks torch or megatron-core anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qsparse_layers.config import LinearFormat

MAX_COLUMNS = 4
MAX_ROWS = 16


@dataclass(frozen=True)
class ParallelGrid:
    """The layout of a run; sizes as in the `parallel` section, all resolved.

    Attributes:
        num_layers: Transformer layers; every one of the pp * vpp stages holds num_layers / (pp * vpp) of them.
        ep: Expert parallel size; 1 also for a model without experts.
        etp: Tensor parallel size inside experts.
    """

    num_layers: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.cp * self.dp

    def ranks(self, pp: int, dp: int) -> range:
        """Global ranks that hold pipeline stage `pp` of replica `dp`, tensor parallel fastest."""
        width = self.tp * self.cp
        return range((pp * self.dp + dp) * width, (pp * self.dp + dp + 1) * width)

    def layers(self, pp: int) -> list[range]:
        """Layers on pipeline rank `pp`, one range per model chunk (interleaved: chunk v is stage v * pp_size + pp)."""
        count = self.num_layers // (self.pp * self.vpp)
        starts = [(chunk * self.pp + pp) * count for chunk in range(self.vpp)]
        return [range(start, start + count) for start in starts]


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers that share one format; `example` is the path of the first."""

    count: int
    example: str
    format: LinearFormat


@dataclass(frozen=True)
class StartScreen:
    """Everything on the start-up screen.

    Attributes:
        title: Run name and what it is.
        changes: (key, default, value) of every key that differs from its default (`config_loader.differences`).
        layers: Swapped and dense linear layers, see `group_layers`.
        parameters: All parameters of the model, unpadded by parallelism.
        activated_parameters: Parameters that a token multiplies.
        tokens_per_step: Global batch times sequence length.
        total_steps: Optimizer steps of the run.
        dataset: One line about the data.
        device: One line about device, precision and kernel backends.
        run_directory: Where everything goes.
        tracking: How to see the run in MLflow; empty without tracking.
        memory_bytes: Estimated peak per rank; None if unknown.
        resumed_step: Optimizer steps done before this start; None for a new run.
    """

    title: str
    changes: Sequence[tuple[str, Any, Any]]
    grid: ParallelGrid
    layers: Sequence[LayerGroup]
    parameters: int
    activated_parameters: float
    tokens_per_step: int
    total_steps: int
    dataset: str
    device: str
    run_directory: Path
    tracking: str = ""
    memory_bytes: float | None = None
    resumed_step: int | None = None


def group_layers(formats: Mapping[str, LinearFormat]) -> list[LayerGroup]:
    """Group layer paths by identical format, in the order of their first layer."""
    paths: dict[LinearFormat, list[str]] = {}
    for path, layer_format in formats.items():
        plain = LinearFormat(**{name: getattr(layer_format, name) for name in LinearFormat.model_fields})
        paths.setdefault(plain, []).append(path)
    return [LayerGroup(len(group), group[0], layer_format) for layer_format, group in paths.items()]


def render(screen: StartScreen) -> RenderableType:
    """The screen as a rich renderable."""
    tables = [_changes(screen.changes)] if screen.changes else []
    parts: list[RenderableType] = [_facts(screen)]
    for table in (*tables, _grid(screen.grid), _layers(screen.layers)):
        parts += ["", table]
    return Panel(Group(*parts), title=Text(screen.title, style="bold"), border_style="blue")


def _titled_table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"), title_justify="left", box=None, header_style="dim underline", pad_edge=False
    )


def _facts(screen: StartScreen) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _fact_lines(screen):
        table.add_row(name, value)
    return table


def _fact_lines(screen: StartScreen) -> Iterator[tuple[str, str]]:
    total = screen.tokens_per_step * screen.total_steps
    activated = screen.activated_parameters / max(1, screen.parameters)
    yield "parameters", f"{count(screen.parameters)}, activated {count(screen.activated_parameters)} ({activated:.1%})"
    batch = f"{screen.tokens_per_step:,} tokens per step x {screen.total_steps:,} steps = {count(total)} tokens"
    yield "batch", f"{batch}, {total / max(1, screen.parameters):.1f} per parameter"
    if screen.memory_bytes is not None:
        yield "memory", f"about {gibibytes(screen.memory_bytes)} per rank"
    yield "data", screen.dataset
    yield "device", screen.device
    yield "run", str(screen.run_directory)
    if screen.resumed_step is not None:
        yield "resumed", f"at step {screen.resumed_step:,}"
    if screen.tracking:
        yield "tracking", screen.tracking


def _changes(changes: Sequence[tuple[str, Any, Any]]) -> Table:
    table = _titled_table("differs from the defaults")
    for name in ("key", "value", "default"):
        table.add_column(name, style="dim" if name == "default" else "", overflow="fold")
    for key, default, value in changes:
        table.add_row(key, str(value), "absent" if default is None else str(default))
    return table


def _grid(grid: ParallelGrid) -> Table:
    sizes = f"tp {grid.tp}, pp {grid.pp}, cp {grid.cp}, dp {grid.dp}"
    sizes += f", vpp {grid.vpp}" if grid.vpp > 1 else ""
    sizes += f", ep {grid.ep} x etp {grid.etp}" if grid.ep > 1 or grid.etp > 1 else ""
    sizes += ", sequence parallel" if grid.sequence_parallel else ""
    word = "process" if grid.world_size == 1 else "processes"
    table = _titled_table(f"{grid.world_size} {word}: {sizes}")
    table.add_column("stage")
    shown = min(grid.dp, MAX_COLUMNS)
    for dp in range(shown):
        table.add_column(f"replica {dp}")
    if shown < grid.dp:
        table.add_column(f"... {grid.dp - 1}")
    for pp in range(min(grid.pp, MAX_ROWS)):
        more = [_rank_range(grid.ranks(pp, grid.dp - 1))] if shown < grid.dp else []
        table.add_row(_stage_label(grid, pp), *(_rank_range(grid.ranks(pp, dp)) for dp in range(shown)), *more)
    if grid.pp > MAX_ROWS:
        table.add_row(f"... {grid.pp - MAX_ROWS} more stages")
    return table


def _stage_label(grid: ParallelGrid, pp: int) -> str:
    layers = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in grid.layers(pp) if len(r))
    ends = [name for name, at in (("embedding", 0), ("output", grid.pp - 1)) if pp == at]
    return f"pp {pp}: layers {layers}" + (f" + {', '.join(ends)}" if ends else "")


def _rank_range(ranks: range) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _layers(groups: Sequence[LayerGroup]) -> Table:
    table = _titled_table("linear layers")
    table.add_column("layers", justify="right")
    for name in ("for example", "sparsity", "pattern", "weights", "activations", "sub_norm"):
        table.add_column(name, overflow="fold")
    for group in groups:
        layer = group.format
        pattern = "-"
        if layer.sparsity > 0.0:
            pattern = layer.pattern if layer.pattern == "topk" else f"block of {layer.block_size}"
        sparsity = f"{layer.sparsity:g}" if layer.sparsity > 0.0 else "dense"
        row = (group.example, sparsity, pattern, layer.weights, layer.activations, "yes" if layer.sub_norm else "no")
        table.add_row(str(group.count), *row)
    return table


def count(value: float) -> str:
    """A large number with three significant digits and k, M, B or T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # 999,500 prints as 1.00M and not as 1000k
            scaled = value / limit
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}"


def gibibytes(value: float) -> str:
    """Bytes in GiB (MiB below 0.1 GiB)."""
    return f"{value / 2**30:.2f} GiB" if value >= 0.1 * 2**30 else f"{value / 2**20:.1f} MiB"
