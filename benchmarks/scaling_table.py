"""The tables and the picture of docs/scaling.md: models on 8 to 8,192 GPUs, estimated by `qsparse plan`.

    python benchmarks/scaling_table.py --page docs/scaling.md        from the repository root

Every layout is the fastest one that fits, found by the search behind the command.  The global batch grows with the
cluster where it must: two sequences per GPU, at least 1,024.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.bench.results import markdown_table, update_page
from pipeline.config_loader import load_config
from pipeline.plan import accuracy
from pipeline.plan.rates import load_rates
from pipeline.plan.report import draw
from pipeline.plan.search import Cluster, Estimate, Plan, search, supported

GPUS = (8, 64, 512, 4096, 8192)
DRAWN = {64, 8192}
LARGE = "model.num_layers=80 model.hidden_size=8192 model.ffn_hidden_size=28672 model.num_attention_heads=64"
WIDE = "parallel.tp=8 parallel.sequence_parallel=true"
MIXTURE = "'model.moe={num_experts: 64, top_k: 8, ffn_hidden_size: 1376}'"


class Model(NamedTuple):
    """A model on paper."""

    name: str
    config: str
    overrides: str = ""


MODELS = (
    Model("1.3B", "configs/gpt_1.3b.yaml"),
    Model("7B", "configs/gpt_7b.yaml"),
    Model("70B", "configs/gpt_7b.yaml", f"{LARGE} model.num_query_groups=8"),
    Model("MoE", "configs/gpt_7b.yaml", MIXTURE),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/scaling.md"), metavar="FILE", help="page to update")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="h100 or h200 (default: h100)")
    options = parser.parse_args(arguments)
    plans = {model.name: {gpus: plan(model, gpus, options.gpu) for gpus in GPUS} for model in MODELS}
    fragments = {f"layouts {name}": layouts(found) for name, found in plans.items()}
    best = {name: {gpus: p.best[0] for gpus, p in found.items() if p.best} for name, found in plans.items()}
    fragments["accuracy"] = accuracy.table(accuracy.compare(Path("tests/plan/measured.csv"), Path.cwd()))
    fragments |= {f"traffic {name}": traffic(found) for name, found in best.items()}
    wide = plan(
        MODELS[1]._replace(overrides=WIDE), 64, options.gpu, fixed=["parallel.tp", "parallel.sequence_parallel"]
    )
    fragments["savings"] = savings(best | {"7B with TP=8": {64: wide.best[0]}})
    if missing := update_page(options.page, fragments):
        print(f"{options.page} has no place for: {', '.join(missing)}")
    largest = [estimate for found in best.values() for gpus, estimate in found.items() if gpus in DRAWN]
    draw(largest, options.page.parent / "images" / "scaling.png", as_shares=True)
    return 0


def plan(model: Model, gpus: int, gpu: str, fixed: Sequence[str] = ()) -> Plan:
    """The best layouts of `model` on `gpus`."""
    batch = f"training.global_batch_size={max(1024, 2 * gpus)}"
    cleared = [
        "parallel.tp=1",
        "parallel.dp=1",
        "parallel.sequence_parallel=false",
        "parallel.ep=1",
        f"run.name={model.name}",
    ]
    config = load_config(Path(model.config), [*cleared, *shlex.split(model.overrides), batch])
    rates = load_rates(gpu)
    return search(supported(config), fixed, Cluster(gpus, 8, gpu, rates, rates.memory_gib), top=1)


def layouts(found: dict[int, Plan]) -> str:
    """The fastest layout for every number of GPUs."""
    head = (
        "GPUs",
        "sequences",
        "TP",
        "PP x chunks",
        "EP",
        "DP",
        "micro-batch",
        "recompute",
        "GiB",
        "s/step",
        "tokens/s/GPU",
        "MFU",
    )
    rows = []
    for gpus, answer in found.items():
        if not answer.best:
            smallest = answer.too_large[0]
            row = [f"{gpus:,}", f"nothing fits; the smallest takes {smallest.gib:,.0f} GiB"]
            rows.append([*row, *[""] * (len(head) - 2)])
            continue
        item = answer.best[0]
        at, training = item.layout, item.config.training
        sizes = (training.global_batch_size, at.tp, f"{at.pp} x {at.vpp}", at.ep, at.dp, training.micro_batch_size)
        results = (f"{item.gib:.0f}", f"{item.seconds:.2f}", f"{item.tokens_per_second:,.0f}", f"{item.mfu:.0%}")
        rows.append([f"{gpus:,}", *map(str, sizes), training.recompute, *results])
    return markdown_table(head, rows)


def traffic(found: dict[int, Estimate]) -> str:
    """Megabytes that a GPU sends per step, by kind."""
    kinds = list(dict.fromkeys(item.kind for estimate in found.values() for item in estimate.traffic))
    sent = {gpus: {item.kind: item.sent / 1e6 for item in estimate.traffic} for gpus, estimate in found.items()}
    rows = [[kind, *(f"{of[kind]:,.0f}" if kind in of else "" for of in sent.values())] for kind in kinds]
    rows.append(["all", *(f"{sum(of.values()):,.0f}" for of in sent.values())])
    exposed = [f"{estimate.time['communication'] / estimate.seconds:.0%}" for estimate in found.values()]
    return markdown_table(
        ("MB per GPU and step", *(f"{gpus:,}" for gpus in sent)), [*rows, ["share of the step", *exposed]]
    )


def savings(best: dict[str, dict[int, Estimate]]) -> str:
    """What 8-bit activations save, and with them 2-bit parameters."""
    rows = []
    for name, found in best.items():
        for gpus in sorted(found.keys() & DRAWN):
            kinds = found[gpus].traffic
            bf16, sent, small = (sum(getattr(kind, to) for kind in kinds) for to in ("in_bf16", "sent", "with_2bit"))
            sizes = [f"{size / 1e6:,.0f}" for size in (bf16, sent, small)]
            rows.append(
                [f"{name}, {gpus:,}", *sizes[:2], f"{1 - sent / bf16:.1%}", sizes[2], f"{1 - small / bf16:.1%}"]
            )
    head = ("MB per GPU and step", "all in bf16", "as the code sends", "saved", "with ternary_param_gather", "saved")
    return markdown_table(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())
