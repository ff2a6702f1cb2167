"""One token after the other: a model that keeps keys and values, with its ternary weights in two bits on a GPU.

The results are those of `Engine.logits` on the whole text up to the rounding of another attention kernel: quantization,
sparsity and ternary products are per token and exact.  On one GPU a step is captured as a CUDA graph, because launching
the kernels of one token takes longer than running them.

Shapes: b rows, s tokens, V vocabulary.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pipeline.config import Config
from pipeline.model import Model, unwrap, uses_triton
from pipeline.step_graph import EAGER_STEPS
from qsparse_layers.kv_cache import Attend, Place, remembering
from qsparse_layers.packed import packed_weights


def can_decode(config: Config) -> bool:
    """Whether a token can be computed by itself: a rank holds all layers and whole rows of single tokens.

    With a capacity the experts' choice of tokens depends on all of them.
    """
    parallel, moe = config.parallel, config.model.moe
    is_whole = parallel.pp == 1 and parallel.cp == 1 and not parallel.sequence_parallel
    return is_whole and (moe is None or moe.capacity_factor is None)


class Decoder:
    """Reads texts of equal length, then one token of each at a time; made by `decoding`.

    Args:
        gpt: the model.
        place: of its memory.
        use_graph: capture a step as a CUDA graph.
    """

    def __init__(self, gpt: GPTModel, place: Place, *, use_graph: bool) -> None:
        self._gpt, self._place, self._use_graph = gpt, place, use_graph
        self._angles = gpt.rotary_pos_emb(self.most)
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens, self._logits = torch.empty(0), torch.empty(0)
        self.length = 0
        """Tokens read of each text."""

    @property
    def most(self) -> int:
        """Tokens of a text that the memory holds."""
        return self._place.num_positions

    def start(self, tokens_bs: Tensor) -> Tensor:
        """Read the beginnings of new texts; returns logits [b, V] of what follows.

        Args:
            tokens_bs: int64.

        Raises:
            ValueError: they are more than the memory holds.
        """
        if tokens_bs.shape[1] > self.most:
            raise ValueError(f"texts of {tokens_bs.shape[1]} tokens, the memory holds {self.most}")
        self._place.move_to(0)
        self.length = tokens_bs.shape[1]
        logits = self._run(tokens_bs, self._angles[: self.length])
        self._place.move_to(self.length)
        return logits

    def step(self, tokens_b: Tensor) -> Tensor:
        """Read one more token of each text, int64; returns logits [b, V], which the next step may overwrite.

        Raises:
            ValueError: the memory is full.
        """
        if self.length == self.most:
            raise ValueError(f"the memory holds {self.length} tokens and is full")
        self.length += 1
        if not self._use_graph or self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            return self._step(tokens_b)
        if self._graph is None:
            self._graph = self._capture(tokens_b)
        self._tokens.copy_(tokens_b)
        self._graph.replay()
        return self._logits

    def _step(self, tokens_b: Tensor) -> Tensor:
        logits = self._run(tokens_b[:, None], self._angles.index_select(0, self._place.position))
        self._place.advance()
        return logits

    @torch.no_grad()
    def _run(self, tokens_bs: Tensor, angles: Tensor) -> Tensor:
        """What `GPTModel.forward` does, with the angles of these tokens and logits of the last one only."""
        gpt = self._gpt
        hidden = gpt.embedding(input_ids=tokens_bs, position_ids=None)
        hidden = gpt.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)
        weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
        logits, _ = gpt.output_layer(hidden[-1:], weight=weight, runtime_gather_output=True)
        return logits[0]

    def _capture(self, tokens_b: Tensor) -> torch.cuda.CUDAGraph:
        self._tokens = tokens_b.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads (data, tracking) go on calling CUDA while this one captures.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._step(self._tokens)
        return graph


@contextmanager
def decoding(model: Model, config: Config, *, num_rows: int = 1, pack: bool = True) -> Iterator[Decoder]:
    """A decoder of `model`, whose training is over: layers keep the codes of the weights as they are now.

    A step is captured as a CUDA graph on one GPU without experts, whose dispatch may wait for the host.

    Args:
        model: for which `can_decode` holds.
        config: of its run; `training.seq_length` is the longest text.
        num_rows: texts at once.
        pack: read ternary weights in two bits where there are kernels.
    """
    (chunk,) = model.chunks
    gpt = unwrap(chunk).eval()
    device = next(gpt.parameters()).device
    if model.schedule.weight_version is None:
        model.schedule.weights_changed()  # from here on layers keep their codes
    place = Place(config.training.seq_length, device)
    use_graph = device.type == "cuda" and torch.distributed.get_world_size() == 1 and config.model.moe is None
    packed = packed_weights((layer.module for layer in model.layers), num_rows) if pack else nullcontext()
    with packed, remembering(gpt, num_rows, place, _attention_kernel(config)):
        yield Decoder(gpt, place, use_graph=use_graph)


def _attention_kernel(config: Config) -> Attend | None:
    if not uses_triton(config) or config.training.precision != "bf16":
        return None
    kernel = importlib.import_module("kernels.decode_attention")  # needs Triton
    attend: Attend = kernel.attend
    return attend if config.model.head_size <= kernel.MAX_FEATURES else None
