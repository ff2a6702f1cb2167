"""Logits token by token, with a memory, against whole passes; run with torchrun.

Arguments: a JSON file of {name: config dictionary}, and a JSON file to write {name: what `compare` found} to.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.cpu_backend import install, uses_cpu

if __name__ == "__main__":  # megatron-core may be imported only after this
    CASES = json.loads(Path(sys.argv[1]).read_text())
    CPU = uses_cpu(next(iter(CASES.values()))["run"]["device"])
    install(cpu=CPU)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pipeline.config import Config
from pipeline.decoding import Decoder, can_decode, decoding
from pipeline.learner import Learner
from pipeline.next_token import CachedContext, Predict, WholeContext, next_token
from pipeline.world import current_world, initialize_layout
from qsparse_layers.packed import packed_weights
from tests.testing import TextWindows

EOD = ord("\n")
LENGTHS = [1, 2, 3, 4, *range(25, 36), 5, 6, 3]
"""Of texts in turn, some longer by one token, others read from the beginning; the context is 32 tokens."""


def predictions(learner: Learner, text: list[int]) -> tuple[bool, Tensor]:
    """Whether there is a memory, and logits [texts, vocabulary]."""
    with next_token(learner, EOD) as predict:
        return isinstance(predict, CachedContext), logits(predict, text)


def logits(predict: Predict, text: list[int]) -> Tensor:
    """[texts, vocabulary]."""
    found = [predict(text[:length]).float().clone() for length in LENGTHS]  # a graph writes to the same place
    return torch.stack(found)


def compare(config: Config) -> dict[str, Any]:
    """Largest relative difference, whether there was a memory, and whether two-bit weights gave the same bits."""
    initialize_layout(config)
    try:
        learner = Learner(config, current_world(config), None, vocab_size=256, eod_id=EOD)
        text = TextWindows(48).windows([3])[0].tolist()
        text[2] = text[28] = EOD
        whole = WholeContext(learner.engine, config.training.seq_length, learner.world.device)
        expected = logits(whole, text)
        remembers, found = predictions(learner, text)
        assert remembers == can_decode(config)
        distance = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
        result = {"distance": distance, "remembers": remembers}
        if remembers:
            with decoding(learner.model, config, pack=False) as decoder:
                eod_id = EOD if learner.engine.inputs.by_document else None
                plain = CachedContext(decoder, learner.world.device, eod_id)
                result["equal"] = torch.equal(logits(plain, text), found)
                result["refused"] = refusals(decoder, torch.tensor([text], device=learner.world.device))
            with packed_weights((layer.module for layer in learner.model.layers), 1):
                result["packed"] = any(_is_packed(layer) for layer in learner.model.layers)
            assert not any(_is_packed(layer) for layer in learner.model.layers)
        return result
    finally:
        parallel_state.destroy_model_parallel()


def refusals(decoder: Decoder, tokens: Tensor) -> list[str]:
    """What a decoder says about more tokens than it remembers."""
    decoder.start(tokens[:, :32])
    found = []
    for call in (lambda: decoder.step(tokens[0, :1]), lambda: decoder.start(tokens)):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def _is_packed(layer: Any) -> bool:
    operand = layer.module.cache._operand
    return operand is not None and operand.packed is not None


def main(cases: dict[str, dict], output: Path, *, cpu: bool) -> None:
    """Run every case and write what was found on rank 0."""
    torch.set_num_threads(1)
    if not cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if cpu else "nccl")
    results = {name: compare(Config(**values)) for name, values in cases.items()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(CASES, Path(sys.argv[2]), cpu=CPU)
