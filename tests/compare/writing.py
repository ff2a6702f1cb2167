"""Run directories with known numbers."""

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config_loader import dump_config
from pipeline.metrics import MetricsLog
from pipeline.run_directory import RunDirectory

TOKENS_PER_STEP = 4096
LAYER = "decoder.layers.0.mlp.linear_fc1"


def write_run(
    root: Path,
    name: str,
    *,
    steps: int = 100,
    loss: float = 4.0,
    batch: int = 1,
    sparsity: float = 0.0,
    state: str = "completed",
    metrics: tuple[str, ...] = ("train/loss", "val/loss", "train/tokens"),
    experts: int = 0,
    **settings: Any,
) -> Path:
    """A run whose losses are `loss` + 100 / step, with a held-out loss 0.5 above at every tenth step."""
    directory = RunDirectory(root / name)
    config = Config.model_validate({"run": {"name": name, "root": str(root)}, **settings})
    directory.create(dump_config(config), {"world_size": "2", "vocab_size": "1000", "device": "CPU", "torch": "2.13"})
    with MetricsLog(directory.metrics) as log:
        for step in range(1, steps + 1):
            record = {
                "train/loss": loss + 100 / step,
                "train/tokens": float(batch * TOKENS_PER_STEP * step),
                "train/grad_norm": 1.0 / step,
                "perf/tokens_per_second": 1000.0 * batch + step % 2,
                "perf/step_seconds": 0.5,
                "perf/data_wait_seconds": 0.05,
                "mem/peak_bytes": 2.0**30 * batch,
                "qsparse/sparsity": sparsity,
                "qsparse/activated_parameters": 1e6 * (1 - sparsity),
                "qsparse/ternary_zeros": 0.25,
                f"layer_sparsity/{LAYER}": sparsity,
                f"layer_ternary_zeros/{LAYER}": 0.25,
            }
            if step % 10 == 0:
                record["val/loss"] = loss + 0.5 + 100 / step
            for expert in range(experts):
                record[f"layer_expert_tokens/decoder.layers.0.mlp.experts.{expert}"] = 100.0 * (expert + 1)
            dropped = {"train/loss", "val/loss", "train/tokens"} - set(metrics)
            log.write({key: value for key, value in record.items() if key not in dropped}, step)
    directory.write_status(state, steps, "test")  # type: ignore[arg-type]
    return directory.path


def write_text(path: Path, record: dict[str, Any]) -> None:
    """One JSON object as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n")
