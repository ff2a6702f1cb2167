"""Attention inside documents against every document alone; run it with torchrun and a JSON file for the differences."""

import json
import os
import sys
from pathlib import Path

from pipeline.cpu_backend import install

if __name__ == "__main__":  # megatron-core may be imported only after this
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pipeline.config import Config
from pipeline.learner import Learner
from pipeline.model import unwrap
from pipeline.world import current_world, initialize_layout
from tests.distributed.test_layouts import FULL, case

EOD = 0
LENGTHS = [[5, 1, 1, 20, 5], [32], [1, 30, 1]]
"""Lengths of the documents of three sequences of 32 tokens; all but the last of a sequence end in EOD."""


def tokens() -> Tensor:
    """int64 [3, 33]."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(1, 256, (3, 33), generator=generator)
    for row, lengths in enumerate(LENGTHS):
        for end in torch.tensor(lengths).cumsum(0)[:-1].tolist():
            found[row, end - 1] = EOD
    return found


def learner_of(data: dict, *, sparsity: bool, attention_groups: int = 2) -> Learner:
    values = case(FULL if sparsity else {}, "fp64", {})
    values["model"]["num_query_groups"] = attention_groups
    config = Config(**{**values, "data": data})
    if not parallel_state.is_initialized():
        initialize_layout(config)
    return Learner(config, current_world(config), None, vocab_size=256, eod_id=EOD)


def differences(*, sparsity: bool, groups: int) -> dict[str, float]:
    """Largest differences of logits, loss and gradients, and how much attention over documents would change logits."""
    batch = tokens()
    packed = learner_of({"attention": "document"}, sparsity=sparsity, attention_groups=groups)
    logits = packed.engine.logits(batch[:, :-1])
    losses = packed.engine.train(batch[None], 1)[0]
    gradients = {name: p.main_grad.clone() for name, p in unwrap(packed.chunks[0]).named_parameters()}
    masked = learner_of({"attention": "document", "mask_eod_loss": True}, sparsity=sparsity, attention_groups=groups)
    masked_loss = masked.engine.train(batch[None], 1)[0].mean()
    alone = learner_of({}, sparsity=sparsity, attention_groups=groups)
    full = alone.engine.logits(batch[:, :-1])
    found = {"without boundaries": float((full - logits).abs().max())}
    parts, kept = [], []
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            document = batch[row : row + 1, begin : begin + length]
            difference = (alone.engine.logits(document) - logits[row : row + 1, begin : begin + length]).abs().max()
            found["logits"] = max(found.get("logits", 0.0), float(difference))
            labels = batch[row : row + 1, begin + 1 : begin + length + 1]
            positions = torch.arange(length)[None]
            model = unwrap(alone.chunks[0])
            losses_of = model(input_ids=document, position_ids=positions, attention_mask=None, labels=labels)
            parts.append(losses_of.flatten())
            kept.append(losses_of.flatten()[document.flatten() != EOD])
            begin += length
    expected = torch.cat(parts).mean()
    found["loss"] = float((losses.mean() - expected).abs())
    found["masked loss"] = float((masked_loss - torch.cat(kept).mean()).abs())
    named = dict(unwrap(alone.chunks[0]).named_parameters())
    alone_gradients = torch.autograd.grad(expected, list(named.values()))
    for name, gradient in zip(named, alone_gradients, strict=True):
        difference = (gradient - gradients[name]).norm() / gradient.norm()
        found["gradients"] = max(found.get("gradients", 0.0), float(difference))
    parallel_state.destroy_model_parallel()
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group("gloo")
    results = {
        f"sparsity={sparsity} groups={groups}": differences(sparsity=sparsity, groups=groups)
        for sparsity, groups in ((False, 4), (False, 2), (True, 2))
    }
    Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()
