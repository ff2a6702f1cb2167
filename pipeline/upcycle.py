"""A dense checkpoint as the beginning of a mixture of experts: every expert starts as a copy of the layer's FFN.

Sparse upcycling (arXiv 2212.05055).  Right after it the mixture computes what the dense model did: a token's router
probabilities sum to one over its k experts, which are all the same.  They part because tokens do.  The router is new.

The dense FFN is one sharded tensor per matrix in the checkpoint.  Each rank asks for its expert-tensor-parallel shard
of it under its dense name and copies that into all its local experts, so any layout loads from any layout, and no rank
holds more than it will train.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.nn import Module

from moe.layer import QSparseMoELayer
from pipeline.checkpoint import checkpoint_metadata, chunk_names, told_to_all
from pipeline.model import unwrap


def dense_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """`checkpoint.model_shape` of the dense model that a mixture of this shape is upcycled from."""
    return {**shape, "model.moe": None}


def load_dense(folder: Path, chunks: list[Module]) -> None:
    """Fill a mixture's chunks from the checkpoint of a dense model, written under any layout.

    Raises:
        UserError: its files cannot be read.
    """
    metadata = checkpoint_metadata()
    wanted: dict[str, Any] = {}
    for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
        model = unwrap(chunk)
        state = model.sharded_state_dict(metadata=metadata)
        new = (".mlp.experts.", ".mlp.router.")
        wanted[name] = {key: value for key, value in state.items() if not any(part in key for part in new)}
        for path, layer in _moe_layers(model):
            numbered = next(value.key for key, value in state.items() if key == f"{path}.router.weight")
            dense = numbered.removesuffix("router.weight")
            for key, value in layer.experts.local_experts[0].sharded_state_dict(dense, (), metadata).items():
                wanted[name][f"{path}.dense.{key.removeprefix(dense)}"] = value
    with told_to_all(f"checkpoint {folder} cannot be read"):
        # Every expert-parallel rank asks for the same shards: no one rank is the owner that the check looks for.
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
        _fill(unwrap(chunk), loaded[name])


def _moe_layers(model: Module) -> list[tuple[str, QSparseMoELayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, QSparseMoELayer)]


@torch.no_grad()
def _fill(model: Module, loaded: dict[str, Any]) -> None:
    for path, layer in _moe_layers(model):
        prefix = f"{path}.dense."
        ffn = {key.removeprefix(prefix): loaded.pop(key) for key in list(loaded) if key.startswith(prefix)}
        for expert in layer.experts.local_experts:
            expert.load_state_dict(ffn)
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    left_out = [key for key in missing if ".mlp.experts." not in key and ".mlp.router." not in key]
    assert not left_out and not unexpected, (left_out, unexpected)
