"""Attention that remembers: keys and values of all tokens so far, so that the next token costs one row of the model.

`remembering` puts `CachedAttention` in the place of each layer's core attention, whichever that is.  Everything around
it stays the layer's own: projections, rotary embedding (given the rows of its table that belong to the tokens) and
tensor parallelism, which makes the memory a rank's own heads.

Where the next token goes is a tensor, so a step is the same launches on the same addresses at every position, which a
CUDA graph can repeat: the kernel reads up to that position, PyTorch's attention all of the memory through a mask.

Shapes: b rows, s tokens, M positions, h heads, g key/value heads, d features of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention


class Place:
    """Where in the text a model is; shared by all layers.

    Args:
        num_positions: M, the longest text.
        device: of the model.
    """

    def __init__(self, num_positions: int, device: torch.device) -> None:
        self.num_positions = num_positions
        self._positions = torch.arange(num_positions, device=device)[None]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        """Of the token in progress, [1]."""

    def move_to(self, position: int) -> None:
        """The next token is that of `position`."""
        self.position.fill_(position)

    def advance(self) -> None:
        """The next token follows this one; in place."""
        self.position.add_(1)

    @property
    def visible(self) -> Tensor:
        """Which positions this token sees, bool [1, M]."""
        return self._positions <= self.position


Attend = Callable[..., Tensor]
"""`kernels.decode_attention.attend`."""


class CachedAttention(Module):
    """Causal attention of a text's beginning, or of one token after what went before; no gradients.

    Args:
        place: which token is next.
        memory: zeros [2, b, g, M, d].
        attend: kernel for one token; None: scaled_dot_product_attention under a mask.
    """

    def __init__(self, place: Place, memory: Tensor, attend: Attend | None) -> None:
        super().__init__()
        self._place, self._attend = place, attend
        self._keys, self._values = memory
        self._arrivals = memory.new_zeros(memory[0, ..., 0, 0].numel(), dtype=torch.int32)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[s, b, h, d], twice [s, b, g, d] -> [s, b, h d]: one token, that of `place`, or positions 0 to s - 1."""
        if len(query) == 1 and self._attend is not None:
            place = {"position": self._place.position, "arrivals": self._arrivals}
            found = self._attend(query[0], key[0], value[0], keys=self._keys, values=self._values, **place)
            return found.flatten(1)[None]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if len(query) > 1:
            self._keys[:, :, : len(key)] = k
            self._values[:, :, : len(key)] = v
            found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return found.permute(2, 0, 1, 3).flatten(2)
        self._keys.index_copy_(2, self._place.position, k)
        self._values.index_copy_(2, self._place.position, v)
        q = q.view(len(q), k.shape[1], -1, q.shape[-1])  # the heads of a group are rows over the same keys
        found = scaled_dot_product_attention(q, self._keys, self._values, attn_mask=self._place.visible)
        return found.reshape(1, len(q), -1)


@contextmanager
def remembering(model: Module, num_rows: int, place: Place, attend: Attend | None = None) -> Iterator[None]:
    """Within this, the self-attentions of `model` are `CachedAttention`.

    Args:
        model: all layers.
        num_rows: b, texts at once.
        place: starts at position 0.
        attend: see `CachedAttention`.
    """
    found = [module for module in model.modules() if isinstance(module, SelfAttention)]
    cores = [attention.core_attention for attention in found]
    try:
        for attention in found:
            heads, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
            memory = next(attention.parameters()).new_zeros(2, num_rows, heads, place.num_positions, width)
            attention.core_attention = CachedAttention(place, memory, attend)
        yield
    finally:
        for attention, core in zip(found, cores, strict=True):
            attention.core_attention = core
