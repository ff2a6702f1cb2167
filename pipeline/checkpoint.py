"""Checkpoints that are there or not, never half: megatron-core's sharded format, one folder per step.

    checkpoints/step-00000100/       model and optimizer shards, reshardable (TP, PP, EP, DP may change)
                              meta.json   step, consumed samples, data fingerprint, model shape, sizes of files

A checkpoint is written to a hidden folder and renamed when every rank is done, and hidden again before it is removed,
so a kill at any moment loses at most the work since the last one.  `meta.json` is read first: a checkpoint of another
model or data order is refused by naming the keys that differ, before any tensor is touched.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module

from pipeline.config import CheckpointConfig, Config
from pipeline.config_layers import layer_formats
from pipeline.data.bad_chunks import BadChunk
from pipeline.errors import UserError
from pipeline.model import unwrap
from pipeline.world import agreement

_PREFIX = "step-"
_EXPERT_SHAPE = {"num_experts", "layer_frequency", "first_dense_layers", "ffn_hidden_size", "shared_ffn_hidden_size"}
_HIDDEN_SUFFIX = ".incomplete"


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
    data_order: dict[str, Any] = field(default_factory=dict)
    """What the fingerprint is a hash of, for saying what differs."""
    bad_chunks: list[BadChunk] = field(default_factory=list)
    """Chunks that are gone around from here on."""
    model_shape: dict[str, Any] = field(default_factory=dict)
    """Keys that decide the shapes of tensors; see `model_shape`."""
    optimizer_format: dict[str, Any] = field(default_factory=dict)
    """Keys that decide what the optimizer keeps; see `optimizer_format`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Libraries that wrote the checkpoint."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file, so that half a copy is recognized before ranks trip over it."""


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
        "model.moe": None if model.moe is None else model.moe.model_dump(include=_EXPERT_SHAPE),
        "model.qsparse.sub_norm": _layers_with_sub_norm(config),
    }


def _layers_with_sub_norm(config: Config) -> bool | list[str]:
    """Whether row-parallel layers have a SubLN gain; their paths if rules give it to some only."""
    formats = layer_formats(config.model, config.parallel)
    rows = {path: layout.sub_norm for path, layout in formats.items() if path.endswith(("linear_proj", "linear_fc2"))}
    found = [path for path, has_gain in rows.items() if has_gain]
    return found if 0 < len(found) < len(rows) else bool(found)


def optimizer_format(config: Config) -> dict[str, Any]:
    """The keys that must agree for the optimizer's state to fit, however it is sharded."""
    return {
        "parallel.distributed_optimizer": config.parallel.distributed_optimizer,
        "training.precision": config.training.precision,
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
        names = [meta.parent.name.removeprefix(_PREFIX) for meta in self.directory.glob(f"{_PREFIX}*/meta.json")]
        return sorted(int(name) for name in names if name.isdecimal())  # step-00000100.bak is somebody's own

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
        """Write a checkpoint on all ranks, make it visible, and remove those that retention no longer keeps.

        Raises:
            UserError: the folder cannot be written.
        """
        final = self._folder(progress.step)
        hidden = _hidden(final)
        main = dist.get_rank() == 0
        with agreement():
            if main:
                self.remove_incomplete()
                hidden.mkdir(parents=True)
        _gather_parameters(chunks)
        with told_to_all(f"checkpoint {final} cannot be written"):
            dist_checkpointing.save(_state(chunks, optimizer, is_loading=False), str(hidden))
        with agreement():
            if main:
                versions = {"megatron-core": megatron.core.__version__, "torch": torch.__version__}
                files = {path.name: path.stat().st_size for path in sorted(hidden.iterdir())}
                write_meta(hidden, replace(progress, versions=versions, files=files))
                shutil.rmtree(final, ignore_errors=True)  # a folder of this name that is no checkpoint
                os.replace(hidden, final)
                self._prune()
        return final

    def remove_incomplete(self) -> None:
        """Remove what killed runs left of a save or a removal; only for the one process that owns the run."""
        for folder in self.directory.glob(f".{_PREFIX}*{_HIDDEN_SUFFIX}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self) -> None:
        steps = self.steps()
        every = self.settings.keep_every
        for step in steps[: -self.settings.keep_last]:
            if not every or step % every:
                hidden = _hidden(self._folder(step))  # a kill in the middle must not leave half a checkpoint visible
                os.replace(self._folder(step), hidden)
                shutil.rmtree(hidden, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.directory / f"{_PREFIX}{step:08d}"


def _gather_parameters(chunks: list[Module]) -> None:
    """With an overlapped gather the last step's parameters arrive in the next forward pass: too late for a save."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_HIDDEN_SUFFIX}")


def read_progress(folder: Path) -> Progress:
    """What the checkpoint says of itself.

    Raises:
        CheckpointError: there is no complete checkpoint in `folder`.
    """
    meta = folder / "meta.json"
    try:
        values = json.loads(meta.read_text())
        return Progress(**{**values, "bad_chunks": [BadChunk(*chunk) for chunk in values.get("bad_chunks", ())]})
    except (FileNotFoundError, NotADirectoryError):
        below = sorted(folder.glob(f"**/{_PREFIX}*/meta.json"))
        hint = f"; did you mean {below[-1].parent}?" if below else ""
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no meta.json{hint}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{meta} is damaged or of another version of qsparse: {error}") from None


def write_meta(folder: Path, progress: Progress) -> None:
    """Write meta.json and force it to disk before the folder is renamed."""
    with (folder / "meta.json").open("w") as file:
        json.dump(asdict(progress), file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def check_fits(saved: Progress, shape: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: names every key that differs and both values.
    """
    if wrong := _differences(saved.model_shape, shape):
        raise CheckpointError(f"checkpoint {folder} is of another model: {wrong}")


def check_resumable(
    saved: Progress, config: Config, fingerprint: str, folder: Path, order: dict[str, Any] | None = None
) -> None:
    """Refuse to go on with another data order or another kind of optimizer.

    Raises:
        CheckpointError: names what differs and both values.
    """
    if fingerprint != saved.data_fingerprint:
        found = _differences(saved.data_order, order or {}) or f"fingerprint {fingerprint[:12]}"
        raise CheckpointError(
            f"checkpoint {folder} was trained on another dataset, sequence length or data.seed: resuming would repeat "
            f"or skip samples. Restore the keys of data and training.seq_length, or start a new run with "
            f"checkpoint.load. Now: {found}"
        )
    if wrong := _differences(saved.optimizer_format, optimizer_format(config)):
        raise CheckpointError(
            f"checkpoint {folder} has the state of another kind of optimizer: {wrong}. Restore that, or start a new "
            "run from its weights with checkpoint.load"
        )


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    return "; ".join(
        f"{key}={value!r} but the checkpoint has {saved.get(key)!r}"
        for key, value in wanted.items()
        if saved.get(key) != value
    )


def check_files(saved: Progress, folder: Path) -> None:
    """Refuse a checkpoint whose files are not those that were written.

    Raises:
        CheckpointError: a file is missing or has another size.
    """
    for name, size in saved.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} {problem}; copy it again, or move the folder away to take the "
                "checkpoint before it"
            )


def load(folder: Path, chunks: list[Module], optimizer: MegatronOptimizer | None) -> None:
    """Fill the model, and the optimizer if given, from a checkpoint written under any layout.

    Raises:
        UserError: its files cannot be read.
    """
    with told_to_all(f"checkpoint {folder} cannot be read"):
        state = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), str(folder))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state[f"model{index}" if len(chunks) > 1 else "model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


@contextmanager
def told_to_all(what: str) -> Iterator[None]:
    """torch gathers what went wrong on any rank and raises it on all, as a BaseException full of tracebacks.

    Raises:
        UserError: `what`, and the first rank's cause.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise UserError(f"{what}: {type(cause).__name__} on rank {rank}: {cause}") from error


def _state(chunks: list[Module], optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = checkpoint_metadata()
    state: dict[str, Any] = {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(chunk_names(chunks), chunks, strict=True)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def checkpoint_metadata() -> dict[str, Any]:
    """How megatron-core lays out a checkpoint; parallel state must be initialized."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,  # one key per layer: rules may give layers different parameters
    }


def chunk_names(chunks: list[Module]) -> list[str]:
    """Keys of the chunks in a checkpoint's state; the tensors' own keys do not depend on them."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
