"""Loss against activated parameters and tokens: dense, Q-Sparse BitNet, a mixture, and a Q-Sparse BitNet mixture.

    python benchmarks/moe_quality.py --data data/stdlib --output docs/images/moe_quality
    python benchmarks/moe_quality.py --data data/books --device cuda --jobs 4 --output docs/images/moe_quality_gpu

Four runs of `qsparse train` on one process each, with the same tokens, order and seed.  The mixture's k experts are
together as wide as the dense FFN, so that both have the same active projections (N_active); the sparse runs activate
N_active (1 - S) of them, S as measured over the last quarter of the run.  Learning rates are those of the papers for
their format, doubled for models of this size (arXiv 2407.10969 table 8: ternary models take three times the rate of
full-precision ones): a common rate would favour one of them.

Writes OUTPUT.md and OUTPUT.png; the runs stay in `--runs`, and a finished one is not repeated.
"""

import argparse
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.metrics import read_metrics, series


@dataclass(frozen=True)
class Size:
    """A model and a batch for one kind of machine; precision and layout are those of the machine."""

    steps: int
    expert_width: int
    """Of eight experts, two per token: half of the dense FFN."""
    overrides: tuple[str, ...]


SIZES = {
    "cpu": Size(
        *(200, 176),
        (
            *("model.num_layers=4", "model.hidden_size=128", "model.ffn_hidden_size=352"),
            *("model.num_attention_heads=4", "model.num_query_groups=4", "training.eval_sequences=64"),
            *("training.global_batch_size=8", "training.micro_batch_size=8", "training.seq_length=128"),
        ),
    ),
    "cuda": Size(
        *(500, 896),
        (
            *("model.num_layers=8", "model.hidden_size=640", "model.ffn_hidden_size=1792"),
            *("model.num_attention_heads=10", "model.num_query_groups=10", "training.eval_sequences=256"),
            *("training.global_batch_size=64", "training.micro_batch_size=64", "training.seq_length=512"),
            "training.precision=bf16",
        ),
    ),
}
FULL_RATES = ("optimizer.schedule=cosine", "optimizer.lr=1.2e-3")
TERNARY_RATES = ("optimizer.schedule=two_stage", "optimizer.lr=3.6e-3", "optimizer.stage2_lr=2.4e-3")
SPARSE = ("model.qsparse={sparsity: 0.4, weights: ternary, activations: int8, sub_norm: true}", *TERNARY_RATES)
RUNS: dict[str, tuple[tuple[str, ...], bool]] = {
    "dense": (FULL_RATES, False),
    "qsparse_bitnet": (SPARSE, False),
    "moe": (FULL_RATES, True),
    "moe_qsparse_bitnet": (SPARSE, True),
}
"""Overrides, and whether the model is a mixture."""


@dataclass(frozen=True)
class Outcome:
    """What one run ended with."""

    name: str
    tokens: list[float]
    losses: list[float]
    activated: float
    total: float
    val_loss: float


def train(name: str, options: argparse.Namespace) -> Outcome:
    """Train one of `RUNS`, or go on with it, and read what it logged."""
    size, (overrides, is_mixture) = SIZES[options.device], RUNS[name]
    steps = options.steps or size.steps
    interval = max(1, steps // 20)
    experts = f"model.moe={{num_experts: 8, top_k: 2, ffn_hidden_size: {size.expert_width}, z_loss_coeff: 1e-3}}"
    command = [sys.executable, "-m", "launch", "train", "configs/base.yaml", f"run.name={name}"]
    command += [f"run.root={options.runs}", f"data.path={options.data}", f"run.device={options.device}"]
    command += [f"training.steps={steps}", f"training.eval_interval={interval}", "training.sample_tokens=0"]
    command += ["tracking.mlflow=false", f"tracking.log_interval={interval}", f"optimizer.warmup_steps={steps // 10}"]
    command += [*size.overrides, *overrides, *([experts] if is_mixture else [])]
    log = Path(options.runs, f"{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        finished = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
    print(f"{name} is done", flush=True)
    records = read_metrics(Path(options.runs, name, "metrics.jsonl"))
    steps, losses = series(records, "val/loss")
    tokens_at = dict(zip(*series(records, "train/tokens"), strict=True))
    activated = series(records, "qsparse/activated_parameters")[1]
    sparsity = series(records, "qsparse/sparsity")[1]
    return Outcome(
        name=name,
        tokens=[tokens_at[step] for step in steps],
        losses=losses,
        activated=float(np.mean(activated[-max(1, len(activated) // 4) :])),
        total=activated[-1] / (1 - sparsity[-1]),
        val_loss=losses[-1],
    )


def table(outcomes: list[Outcome], options: argparse.Namespace) -> str:
    """The results as markdown."""
    lines = [
        "| run | projections a token visits | activated parameters | tokens | held-out loss [nat/token] |",
        "|---|---:|---:|---:|---:|",
    ]
    for run in outcomes:
        figures = f"{run.total / 1e6:,.2f} M | {run.activated / 1e6:,.2f} M | {run.tokens[-1] / 1e6:,.2f} M"
        lines.append(f"| {run.name} | {figures} | {run.val_loss:.4f} |")
    made = f"{where(options)}; {date.today().isoformat()}; commit {options.commit or commit()}"
    return "\n".join([*lines, "", made, ""])


def where(options: argparse.Namespace) -> str:
    """Machine and versions."""
    machine = f"{platform.machine()} CPU, one process"
    if options.device == "cuda":
        import torch

        machine = f"{torch.cuda.get_device_name()}, {options.jobs} runs at a time"
    return f"{machine}, torch {version('torch')}, megatron-core {version('megatron-core')}"


def commit() -> str:
    """Of the working tree, as git knows it."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def draw(outcomes: list[Outcome]) -> Figure:
    """Held-out loss over tokens on the left, over activated parameters on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    over_tokens, over_parameters = figure.subplots(1, 2, sharey=True)
    for run in outcomes:
        over_tokens.plot(run.tokens, run.losses, marker=".", label=run.name)
        over_parameters.plot(run.activated, run.val_loss, marker="o", linestyle="none", label=run.name)
    over_tokens.set(xlabel="tokens", ylabel="held-out loss [nat/token]")
    over_parameters.set(xlabel="activated parameters")
    over_parameters.legend()
    for axes in (over_tokens, over_parameters):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Run, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="dataset folder")
    add("--device", choices=SIZES, default="cpu", help="where; also decides the size of the models (default: cpu)")
    add("--steps", type=int, help="optimizer steps of each run (default: 200 on a CPU, 500 on a GPU)")
    add("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    add("--output", required=True, type=Path, help="path without ending")
    add("--runs", default="runs/moe_quality", help="folder of the runs; finished ones are not repeated")
    add("--commit", help="of the code, for a copy that git does not know")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(partial(train, options=options), RUNS))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(table(outcomes, options))
    draw(outcomes).savefig(options.output.with_suffix(".png"), dpi=130)
    print(table(outcomes, options))


if __name__ == "__main__":
    main()
