"""The small run of these tests, and what it leaves behind as plain values."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from pipeline.metrics import read_metrics

QSPARSE = {"sparsity": 0.4, "pattern": "topk", "weights": "ternary", "activations": "int8", "sub_norm": True}


def write_config(path: Path, root: Path, dataset: Path) -> Path:
    """A model with everything on, that trains 8 sequences of 32 tokens in some 50 ms."""
    heads = {"num_attention_heads": 4, "num_query_groups": 2}
    batch = {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32}
    config = {
        "run": {"root": str(root), "device": "cpu"},
        "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, **heads, "qsparse": QSPARSE},
        "training": {**batch, "steps": 8, "eval_interval": 0, "eval_sequences": 4, "sample_tokens": 0},
        "optimizer": {"lr": 3e-3, "stage2_lr": 2e-3, "warmup_steps": 2},
        "data": {"path": str(dataset)},
        "checkpoint": {"interval": 2, "keep_last": 100},
        "tracking": {"mlflow": False, "log_interval": 1},
    }
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True)
class RunFiles:
    """What a run wrote."""

    path: Path

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    @property
    def incomplete(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob(".*"))

    @property
    def visible(self) -> list[str]:
        return sorted(folder.name for folder in (self.path / "checkpoints").glob("[!.]*"))

    @property
    def newest(self) -> int:
        """Step of the newest complete checkpoint, 0 if there is none."""
        complete = (self.path / "checkpoints").glob("step-????????/meta.json")
        return max((int(meta.parent.name.removeprefix("step-")) for meta in complete), default=0)

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.path / "status.json").read_text())

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of optimizer steps, in file order."""
        return [record for record in read_metrics(self.path / "metrics.jsonl") if "train/loss" in record]

    @property
    def losses(self) -> list[float]:
        """Loss of every step, after checking that each step is there exactly once."""
        records = self.records
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [record["train/loss"] for record in records]

    @property
    def val_losses(self) -> list[tuple[int, float]]:
        records = read_metrics(self.path / "metrics.jsonl")
        return [(record["step"], record["val/loss"]) for record in records if "val/loss" in record]


def kill_after_checkpoint(root: Path, source: str, step: int, name: str) -> None:
    """Make run `name` what a kill of `source` leaves after its checkpoint at `step`: later metrics, no later save."""
    if name != source:
        shutil.copytree(root / source, root / name)
    run = RunFiles(root / name)
    for folder in (run.path / "checkpoints").iterdir():
        if folder != run.checkpoint(step):
            shutil.rmtree(folder)
    (run.path / "status.json").write_text(json.dumps({**run.status, "state": "running", "step": step}))


def lose_checkpoints(root: Path, source: str, name: str) -> None:
    """Make run `name` what is left of `source` after somebody has removed its checkpoints."""
    shutil.copytree(root / source, root / name)
    shutil.rmtree(root / name / "checkpoints")


def copy_in_part(root: Path, source: str, step: int, name: str) -> None:
    """Make run `name` a copy of `source` in which a file of the checkpoint at `step` ends early."""
    shutil.copytree(root / source, root / name)
    os.truncate(RunFiles(root / name).checkpoint(step) / "__0_0.distcp", 1000)


def load_everything(folder: Path) -> dict[str, Any]:
    """Every tensor and number of a checkpoint by name, read with torch alone."""
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    if (separate := folder / "common.pt").is_file():  # before megatron-core 0.18; since then one of the objects
        state["common_state"] = torch.load(separate, weights_only=False)
    return dict(_leaves("", state))


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{path}/{key}", inner)]
    if isinstance(value, list | tuple):
        return [leaf for index, inner in enumerate(value) for leaf in _leaves(f"{path}/{index}", inner)]
    return [(path, value)]


def assert_same_bits(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same tensors bit for bit, and the same numbers."""
    one, other = load_everything(found), load_everything(expected)
    assert one.keys() == other.keys()
    tensors = [name for name, value in one.items() if torch.is_tensor(value)]
    assert sum("exp_avg" in name for name in tensors) > 20  # the optimizer is part of it
    assert [name for name in tensors if not torch.equal(_bits(one[name]), _bits(other[name]))] == []
    rest = one.keys() - set(tensors)
    assert {name: one[name] for name in rest} == {name: other[name] for name in rest}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def optimizer_steps(folder: Path) -> set[int]:
    """Steps that the optimizer counted, one number per parameter group."""
    numbers = load_everything(folder).items()
    return {value for path, value in numbers if path.startswith("/common_state") and path.endswith("/step")}
