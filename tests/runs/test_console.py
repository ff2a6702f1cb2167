import io
import logging
import math
import re
from pathlib import Path

import pytest

from pipeline.console import RunConsole, Summary, duration, perplexity, printable
from pipeline.start_screen import LayerGroup, ParallelGrid, StartScreen, count, gibibytes, group_layers
from qsparse_layers.config import LinearFormat

BITNET = LinearFormat(sparsity=0.4, weights="ternary", activations="int8")
RECORD = {
    "train/loss": 5.12345,
    "train/grad_norm": 0.8124,
    "train/lr": 1.5e-3,
    "train/tokens": 491520.0,
    "perf/step_seconds": 2.0,
    "perf/tokens_per_second": 12_345.0,
    "mem/peak_bytes": 1.5 * 2**30,
    "perf/mfu_dense_bf16": 0.123,
    "qsparse/sparsity": 0.4,
    "qsparse/ternary_zeros": 0.3125,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen() -> StartScreen:
    return StartScreen(
        title="tiny [bold]",
        changes=[("model.qsparse.sparsity", 0.0, 0.4), ("model.moe.top_k", None, 2)],
        grid=ParallelGrid(num_layers=8, tp=2, pp=2, dp=2, vpp=2),
        layers=[
            LayerGroup(16, "decoder.layers.0.self_attention.linear_qkv", BITNET),
            LayerGroup(2, "x", LinearFormat()),
        ],
        parameters=7_340_000,
        activated_parameters=4_404_000.0,
        tokens_per_step=4096,
        total_steps=200,
        dataset="data/stdlib: 1.2M tokens",
        device="cpu, fp32, reference kernels",
        run_directory=Path("runs/tiny"),
        tracking="mlflow ui --backend-store-uri sqlite:////r/mlflow.db",
        memory_bytes=3 * 2**30,
        resumed_step=100,
    )


def cells(output: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`."""
    (line,) = [line for line in output.splitlines() if line.strip("│ ").startswith(first)]
    return re.split(r" {2,}", line.strip("│ "))


def test_start_screen_in_a_file() -> None:
    stream = io.StringIO()
    RunConsole(200, stream=stream).start(screen())
    output = stream.getvalue()
    assert "\x1b" not in output and "tiny [bold]" in output
    assert cells(output, "parameters") == ["parameters", "7.34M, activated 4.40M (60.0%)"]
    assert cells(output, "batch") == ["batch", "4,096 tokens per step x 200 steps = 819k tokens, 0.1 per parameter"]
    assert cells(output, "memory") == ["memory", "about 3.00 GiB per rank"]
    assert cells(output, "resumed") == ["resumed", "at step 100"]
    assert cells(output, "model.qsparse.sparsity") == ["model.qsparse.sparsity", "0.4", "0.0"]
    assert cells(output, "model.moe.top_k") == ["model.moe.top_k", "2", "absent"]
    assert "8 processes: tp 2, pp 2, cp 1, dp 2, vpp 2\n" in re.sub(r" *│$", "", output, flags=re.MULTILINE)
    assert cells(output, "pp 0") == ["pp 0: layers 0-1, 4-5 + embedding", "ranks 0-1", "ranks 2-3"]
    assert cells(output, "pp 1") == ["pp 1: layers 2-3, 6-7 + output", "ranks 4-5", "ranks 6-7"]
    expected = ["16", "decoder.layers.0.self_attention.linear_qkv", "0.4", "topk", "ternary", "int8", "no"]
    assert cells(output, "16") == expected
    assert cells(output, "2 ") == ["2", "x", "dense", "-", "full", "full", "no"]


def test_step_line_in_a_file_is_one_plain_line() -> None:
    stream = io.StringIO()
    console = RunConsole(2000, stream=stream)
    console.step(120, RECORD)
    console.step(130, {"train/loss": 4.0, "train/lr": 1e-3})
    console.advance(130)
    assert stream.getvalue().splitlines() == [
        "step  120/2000  loss  5.1235  grad  0.812  lr 1.50e-03   12.3k tok/s  mem  1.50 GiB  mfu 12.3%  zeros 40.0%"
        "  ternary zeros 31.2%  eta 1:02:40",
        "step  130/2000  loss  4.0000  lr 1.00e-03",
    ]


def test_a_loss_that_is_not_finite_is_shown() -> None:
    stream = io.StringIO()
    RunConsole(9, stream=stream).step(3, {"train/loss": math.nan, "perf/step_seconds": math.inf})
    assert stream.getvalue() == "step 3/9  loss     nan\n"


def test_other_lines() -> None:
    stream = io.StringIO()
    console = RunConsole(200, stream=stream)
    console.evaluation(100, math.log(50.0), 2.25)
    console.checkpoint(100, Path("runs/tiny/checkpoints/" + "x" * 200), 1.0)
    console.message("[red]not markup")
    assert stream.getvalue().splitlines() == [
        "step 100/200  val loss  3.9120  perplexity 50.00  took 2.2 s",
        f"step 100/200  checkpoint runs/tiny/checkpoints/{'x' * 200}  took 1.0 s",
        "[red]not markup",
    ]


def test_final_panel() -> None:
    stream = io.StringIO()
    RunConsole(200, stream=stream).finish(
        Summary(
            state="completed",
            reason="all steps done",
            step=200,
            tokens=819_200,
            seconds=64.0,
            vocab_size=8192,
            run_directory=Path("runs/tiny"),
            val_loss=4.0,
            sample="def f():\n    return \x1b[31m",
            tracking="mlflow ui",
            undelivered=7,
        )
    )
    output = stream.getvalue()
    assert "completed: all steps done" in output
    assert cells(output, "trained") == ["trained", "200 steps, 819k tokens in 0:01:04, 12.8k tokens/s"]
    held_out = "loss 4.0000 nats per token, perplexity 54.60 (a uniform guess: 9.0109 = ln 8192)"
    assert cells(output, "held-out") == ["held-out", held_out]
    assert cells(output, "sample") == ["sample", "def f():"]
    assert "return \N{REPLACEMENT CHARACTER}[31m" in output and "\x1b" not in output
    assert cells(output, "not in mlflow") == ["not in mlflow", "7 values; qsparse track sync runs/tiny"]


def test_a_terminal_gets_colour_and_a_bar_that_is_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with pytest.raises(RuntimeError), RunConsole(200, stream=stream) as console:
        console.start(screen())
        console.advance(101)
        console.step(110, RECORD)
        raise RuntimeError
    output = stream.getvalue()
    assert "\x1b[36m 5.1235" in output
    assert "101/200" in output
    assert output.index("\x1b[?25l") < output.index(" 5.1235") < output.rindex("\x1b[?25h"), "cursor hidden, then back"


def test_everything_goes_to_the_log_file_too_and_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank-00000.log"
    for step in (1, 2):
        with RunConsole(9, stream=Terminal(), log_file=path) as console:
            console.step(step, {"train/loss": 1.0})
    assert path.read_text() == "step 1/9  loss  1.0000\nstep 2/9  loss  1.0000\n"


def test_log_records_go_through_the_console() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("pipeline.tracking")
    with RunConsole(9, stream=stream), RunConsole(9, rank=1, stream=stream):
        logger.warning("MLflow at %s", "x")
    logger.warning("after the run")
    assert stream.getvalue() == "WARNING pipeline.tracking: MLflow at x\n"


def test_other_ranks_print_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunConsole(9, rank=1, stream=stream, log_file=tmp_path / "log") as console:
        console.start(screen())
        console.advance(1)
        console.step(1, RECORD)
        console.message("x")
    assert stream.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_layers_are_grouped_by_identical_format() -> None:
    formats: dict[str, LinearFormat] = {}
    for layer in range(3):
        formats[f"decoder.layers.{layer}.linear_fc1"] = LinearFormat(sparsity=0.4)
        formats[f"decoder.layers.{layer}.linear_fc2"] = LinearFormat(sparsity=0.4, sub_norm=True)
    formats["decoder.layers.1.linear_fc1"] = LinearFormat()
    assert [(group.count, group.example) for group in group_layers(formats)] == [
        (2, "decoder.layers.0.linear_fc1"),
        (3, "decoder.layers.0.linear_fc2"),
        (1, "decoder.layers.1.linear_fc1"),
    ]


@pytest.mark.parametrize("cp", [1, 2])
def test_the_grid_covers_every_rank_once_in_megatrons_order(cp: int) -> None:
    grid = ParallelGrid(num_layers=4, tp=2, pp=2, cp=cp, dp=3)
    assert [rank for pp in range(2) for dp in range(3) for rank in grid.ranks(pp, dp)] == list(range(grid.world_size))
    assert grid.layers(1) == [range(2, 4)]


def test_a_large_grid_is_abbreviated() -> None:
    stream = io.StringIO()
    grid = ParallelGrid(num_layers=40, tp=8, pp=20, dp=64, ep=8)
    values = {**screen().__dict__, "grid": grid}
    RunConsole(9, stream=stream).start(StartScreen(**values))
    output = stream.getvalue()
    assert "10240 processes: tp 8, pp 20, cp 1, dp 64, ep 8 x etp 1" in output
    assert "... 4 more stages" in output and "pp 16" not in output


def test_numbers_for_people() -> None:
    numbers = (0, 999, 999.6, 12_345, 999_499, 999_500, 1.35e9, 2e12)
    assert [count(n) for n in numbers] == ["0", "999", "1.00k", "12.3k", "999k", "1.00M", "1.35B", "2.00T"]
    assert (gibibytes(2**30), gibibytes(50 * 2**20)) == ("1.00 GiB", "50.0 MiB")
    assert (duration(59.6), duration(90061)) == ("0:01:00", "1 day, 1:01:01")
    assert perplexity(0.0) == 1.0 and perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))
    assert printable("a\x00\n\tb\u202e") == "a\N{REPLACEMENT CHARACTER}\n\tb\N{REPLACEMENT CHARACTER}"
