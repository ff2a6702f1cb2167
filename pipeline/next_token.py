"""What may follow a text: logits of a trained model under any layout, with a memory of the text where that works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.decoding import Decoder, can_decode, decoding
from pipeline.engine import Engine
from pipeline.learner import Learner

Predict = Callable[[list[int]], Tensor]
"""From token ids to logits [padded vocabulary] of what follows; collective."""


@contextmanager
def next_token(learner: Learner, eod_id: int) -> Iterator[Predict]:
    """How to predict with the weights of `learner`, whose training is over.

    Args:
        learner: its model and layout; the last `training.seq_length` tokens of a text are what the model sees.
        eod_id: token that ends every document.
    """
    config = learner.config
    if not can_decode(config):
        yield WholeContext(learner.engine, config.training.seq_length, learner.world.device)
        return
    with decoding(learner.model, config) as decoder:
        yield CachedContext(decoder, learner.world.device, eod_id if learner.engine.inputs.by_document else None)


class WholeContext:
    """One forward pass over the whole context, padded behind, where no token sees it.

    Args:
        engine: the model under its layout.
        seq_length: longest context.
        device: the rank's.
    """

    def __init__(self, engine: Engine, seq_length: int, device: torch.device) -> None:
        self._engine, self._seq_length, self._device = engine, seq_length, device

    def __call__(self, ids: list[int]) -> Tensor:
        """See `Predict`."""
        context = ids[-self._seq_length :]
        tokens = torch.zeros(1, self._seq_length, dtype=torch.int64, device=self._device)
        tokens[0, : len(context)] = torch.tensor(context)
        return self._engine.logits(tokens)[0, len(context) - 1]


class CachedContext:
    """Reads what is new since the call before, or everything if the text is another or its beginning is out of sight.

    Args:
        decoder: of one text.
        device: the rank's.
        eod_id: ends a document, behind which the model sees nothing of it; None: it sees all.
    """

    def __init__(self, decoder: Decoder, device: torch.device, eod_id: int | None) -> None:
        self._decoder, self._device, self._eod_id = decoder, device, eod_id
        self._read: list[int] = []

    def __call__(self, ids: list[int]) -> Tensor:
        """See `Predict`."""
        context = self._document(ids)[-self._decoder.most :]
        follows = bool(self._read) and context[:-1] == self._read
        self._read = context
        if follows:
            return self._decoder.step(torch.tensor(context[-1:], device=self._device))[0]
        return self._decoder.start(torch.tensor([context], device=self._device))[0]

    def _document(self, ids: list[int]) -> list[int]:
        """The last document, its end included."""
        if self._eod_id not in ids[:-1]:
            return ids
        return ids[len(ids) - 1 - ids[-2::-1].index(self._eod_id) :]
