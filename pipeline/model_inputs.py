"""What a model chunk is given for one microbatch of tokens, and what its losses weigh.

`full` attention: [b, s] inputs, positions 0 to s - 1.  `document` attention: the sequences are laid one after the
other, [1, b s], with megatron-core's `PackedSeqParams`, which name the boundaries of documents to rotary embedding
(positions count from 0 in each) and attention (a token sees its own document only).  The rest of the model is per token
and does not notice.

Loss weights are 0 where the input is EOD, if `data.mask_eod_loss`, and else equal; over a global batch their mean is 1.
So the mean of weighted losses over microbatches and ranks is the mean over the tokens that count, under every layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from pipeline.config import Config
from pipeline.data.boundaries import cumulative_lengths


@dataclass(frozen=True)
class Microbatch:
    """Tokens of one microbatch and the weights of their losses."""

    tokens_bs: Tensor | None
    """int64 [b, s + 1], or [b, s] without labels; None on pipeline stages that need no tokens."""
    weights_bs: Tensor | None = None
    """float64 [b, s]; None: all 1."""


class ModelInputs:
    """Builds the arguments of GPTModel.forward.

    Args:
        config: the run.
        eod_id: token that ends every document; only needed for `document` attention and masked losses.

    Raises:
        ValueError: it is needed and absent.
    """

    def __init__(self, config: Config, eod_id: int | None) -> None:
        self._cp = config.parallel.cp
        self.by_document, self._masks = config.data.attention == "document", config.data.mask_eod_loss
        if eod_id is None and (self.by_document or self._masks):
            raise ValueError("data.attention=document and data.mask_eod_loss need a dataset that names its EOD token")
        self._eod_id = -1 if eod_id is None else eod_id

    def arguments(self, tokens: Tensor | None, *, labels: bool) -> dict[str, Any]:
        """Arguments for a microbatch; a middle pipeline stage gets its input from its neighbour.

        Args:
            tokens: int64 [b, s + 1] with labels, [b, s] without.
            labels: whether the model computes losses.
        """
        if tokens is None:
            return {"input_ids": None, "position_ids": None, "attention_mask": None}
        inputs = tokens[:, :-1] if labels else tokens
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
        batch = {"input_ids": inputs, "position_ids": positions}
        if labels:
            batch["labels"] = tokens[:, 1:]
        if self.by_document:
            packed = {name: value.reshape(1, -1) for name, value in batch.items()}
            return {**packed, "attention_mask": None, "packed_seq_params": self._documents(inputs)}
        sliced = {name: self.slice_context(value.contiguous()) for name, value in batch.items()}
        return {**sliced, "attention_mask": None}

    def unpack(self, values: Tensor, rows: int) -> Tensor:
        """[1, b s, ...] of packed sequences -> [b, s, ...]."""
        return values.unflatten(1, (rows, -1)).squeeze(0) if self.by_document else values

    def loss_weights(self, tokens: Tensor | None) -> Tensor | None:
        """Weights of the losses of a step, float64 [M, b, s], mean 1 over the global batch; collective over DP ranks.

        Args:
            tokens: int64 [M, b, s + 1] of this rank.
        """
        mask = self.loss_mask(tokens)
        if mask is None:
            return None
        totals = torch.tensor([mask.sum(), mask.numel()], dtype=torch.float64, device=mask.device)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        return mask * (totals[1] / totals[0].clamp(min=1))

    def loss_mask(self, tokens: Tensor | None) -> Tensor | None:
        """1 where the loss counts and 0 where not, float64 [M, b, s]; None: it counts everywhere."""
        if tokens is None or not self._masks:
            return None
        return (tokens[..., :-1] != self._eod_id).double()

    def slice_context(self, tokens_bs: Tensor) -> Tensor:
        """This context-parallel rank's share of the sequence: chunks r and 2 CP - 1 - r of 2 CP, equal causal work."""
        if self._cp == 1:
            return tokens_bs
        rank = parallel_state.get_context_parallel_rank()
        chunks = tokens_bs.chunk(2 * self._cp, dim=1)
        return torch.cat([chunks[rank], chunks[2 * self._cp - 1 - rank]], dim=1)

    def _documents(self, inputs: Tensor) -> PackedSeqParams:
        ends = cumulative_lengths(inputs.cpu().numpy(), self._eod_id)
        cu_seqlens = torch.from_numpy(ends).to(inputs.device)
        # The true maximum: megatron-core takes rotary angles of a table as long as all tokens to be laid out already.
        longest = int((ends[1:] - ends[:-1]).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
