"""Loss against activated parameters and tokens: dense, Q-Sparse BitNet, a mixture, and a Q-Sparse BitNet mixture.

    python benchmarks/moe_quality.py --data data/stdlib --steps 200 --output docs/images/moe_quality

Four runs of `qsparse train` on one process each, with the same tokens, order, seed and schedule.  The mixture's k
experts are together as wide as the dense FFN, so that both have the same active projections (N_active); the sparse
runs activate N_active (1 - S) of them, S as measured over the last quarter of the run.  Writes OUTPUT.md and
OUTPUT.png; the runs stay in `--runs`, and a finished one is not repeated.
"""

import argparse
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.metrics import read_metrics, series

SHAPE = ("model.num_layers=4", "model.hidden_size=128", "model.ffn_hidden_size=352", "model.num_attention_heads=4")
BATCH = ("training.global_batch_size=8", "training.micro_batch_size=8", "training.seq_length=128")
SPARSE = ("model.qsparse={sparsity: 0.4, weights: ternary, activations: int8, sub_norm: true}",)
EXPERTS = ("model.moe={num_experts: 8, top_k: 2, ffn_hidden_size: 176, z_loss_coeff: 1e-3}",)
RUNS = {"dense": (), "qsparse_bitnet": SPARSE, "moe": EXPERTS, "moe_qsparse_bitnet": (*SPARSE, *EXPERTS)}


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
    interval = max(1, options.steps // 20)
    command = [sys.executable, "-m", "launch", "train", "configs/base.yaml", f"run.name={name}"]
    overrides = [f"run.root={options.runs}", f"data.path={options.data}", "run.device=cpu", "parallel.tp=1"]
    overrides += [f"training.steps={options.steps}", f"training.eval_interval={interval}", *SHAPE, *BATCH, *RUNS[name]]
    overrides += ["training.sample_tokens=0", "tracking.mlflow=false", f"tracking.log_interval={interval}"]
    subprocess.run([*command, *overrides], check=True)
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
        figures = f"{run.total / 1e3:,.0f}k | {run.activated / 1e3:,.0f}k | {run.tokens[-1] / 1e3:,.0f}k"
        lines.append(f"| {run.name} | {figures} | {run.val_loss:.4f} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    where = f"{platform.machine()} CPU, one process, torch {version('torch')}, megatron-core {version('megatron-core')}"
    made = f"{where}; {date.today().isoformat()}; commit {commit.stdout.strip()}; {options.steps} steps"
    return "\n".join([*lines, "", made, ""])


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
    parser.add_argument("--data", required=True, help="dataset folder")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", required=True, type=Path, help="path without ending")
    parser.add_argument("--runs", default="runs/moe_quality", help="folder of the runs; finished ones are not repeated")
    options = parser.parse_args()
    outcomes = [train(name, options) for name in RUNS]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(table(outcomes, options))
    draw(outcomes).savefig(options.output.with_suffix(".png"), dpi=130)
    print(table(outcomes, options))


if __name__ == "__main__":
    main()
