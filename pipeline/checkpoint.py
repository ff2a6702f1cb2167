"""Checkpoints that are there or not, never half: megatron-core's sharded format, one folder per step.

    checkpoints/step-00000100/       model and optimizer shards, reshardable (TP, PP, EP, DP may change)
                              meta.json   step, consumed samples, data fingerprint, model shape, versions

A checkpoint is written to a hidden folder and renamed when every rank is done, so a kill at any moment loses at most
the work since the last one.  `meta.json` is read first: a checkpoint of another model or data order is refused by
naming the keys that differ, before any tensor is touched.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch.nn import Module

from pipeline.config import CheckpointConfig, Config
from pipeline.model import unwrap

_PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint that does not fit this run."""


@dataclass(frozen=True)
class Progress:
    """What a resumed run has to know besides tensors."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences trained on: the whole state of the data order."""
    data_fingerprint: str = ""
    """Identity of dataset, sequence length and order."""
    model_shape: dict[str, Any] = field(default_factory=dict)
    """Keys that decide the shapes of tensors; see `model_shape`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Libraries that wrote the checkpoint."""


def model_shape(config: Config, vocab_size: int) -> dict[str, Any]:
    """The keys of a model that must agree for its tensors to fit."""
    model = config.model
    keys = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "activation", "tie_embeddings")
    return {
        **{f"model.{key}": getattr(model, key) for key in keys},
        "model.num_query_groups": model.query_groups,
        "model.head_dim": model.head_size,
        "model.vocab_size": model.vocab_size or vocab_size,
        "model.vocab_multiple": model.vocab_multiple,
        "model.moe": None if model.moe is None else model.moe.model_dump(include={"num_experts", "layer_frequency"}),
        "model.qsparse.sub_norm": model.qsparse.sub_norm,
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: folder that holds them.
        settings: retention.
    """

    def __init__(self, directory: Path, settings: CheckpointConfig) -> None:
        self.directory, self.settings = directory, settings

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        folders = self.directory.glob(f"{_PREFIX}*")
        return sorted(int(folder.name.removeprefix(_PREFIX)) for folder in folders if (folder / "meta.json").is_file())

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint."""
        steps = self.steps()
        return self._folder(steps[-1]) if steps else None

    def require_latest(self) -> Path:
        """`latest`, for callers that cannot do without.

        Raises:
            CheckpointError: there is none.
        """
        folder = self.latest()
        if folder is None:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint; train the run first")
        return folder

    def save(self, chunks: list[Module], optimizer: MegatronOptimizer, progress: Progress) -> Path:
        """Write a checkpoint on all ranks, make it visible, and remove those that retention no longer keeps."""
        final = self._folder(progress.step)
        hidden = self.directory / f".{final.name}.incomplete"
        main = dist.get_rank() == 0
        if main:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(_state(chunks, optimizer, is_loading=False), str(hidden))
        if main:
            versions = {"megatron-core": megatron.core.__version__, "torch": torch.__version__}
            write_meta(hidden, Progress(**{**asdict(progress), "versions": versions}))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(hidden, final)
            self._prune()
        dist.barrier()
        return final

    def _prune(self) -> None:
        steps = self.steps()
        every = self.settings.keep_every
        for step in steps[: -self.settings.keep_last]:
            if not every or step % every:
                shutil.rmtree(self._folder(step), ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.directory / f"{_PREFIX}{step:08d}"


def read_progress(folder: Path) -> Progress:
    """What the checkpoint says of itself.

    Raises:
        CheckpointError: there is no complete checkpoint in `folder`.
    """
    try:
        return Progress(**json.loads((folder / "meta.json").read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no meta.json") from None


def write_meta(folder: Path, progress: Progress) -> None:
    """Write meta.json and force it to disk before the folder is renamed."""
    with (folder / "meta.json").open("w") as file:
        json.dump(asdict(progress), file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def check_fits(saved: Progress, shape: dict[str, Any], folder: Path, fingerprint: str | None = None) -> None:
    """Refuse a checkpoint of another model, or with `fingerprint` of another data order.

    Raises:
        CheckpointError: names every key that differs and both values.
    """
    wrong = [
        f"{key}={value!r} but the checkpoint has {saved.model_shape.get(key)!r}"
        for key, value in shape.items()
        if saved.model_shape.get(key) != value
    ]
    if wrong:
        raise CheckpointError(f"checkpoint {folder} is of another model: " + "; ".join(wrong))
    if fingerprint is not None and fingerprint != saved.data_fingerprint:
        raise CheckpointError(
            f"checkpoint {folder} was trained on another dataset, sequence length or data.seed (fingerprint "
            f"{saved.data_fingerprint}, now {fingerprint}): resuming would repeat or skip samples. "
            "Restore data.path, data.seed and training.seq_length, or start a new run with checkpoint.load"
        )


def load(folder: Path, chunks: list[Module], optimizer: MegatronOptimizer | None) -> None:
    """Fill the model, and the optimizer if given, from a checkpoint written under any layout."""
    state = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), str(folder))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state[f"model{index}" if len(chunks) > 1 else "model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def _state(chunks: list[Module], optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,  # one key per layer: rules may give layers different parameters
    }
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state: dict[str, Any] = {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state
