"""Which rank updates what, against shards of the buffer cut by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.bucket_shards import rank_shards

SIZES, PLACES = [(3, 5), (7,), (2, 20)], [0, 64, 128]


def bucket() -> SimpleNamespace:
    """As megatron-core's: parameters are views of a buffer, with gaps between them and padding at the end."""
    buffer = torch.full((256,), -1.0)
    for place, size in zip(PLACES, SIZES, strict=True):
        buffer[place : place + torch.Size(size).numel()] = torch.arange(torch.Size(size).numel()) + 100.0 * place
    parameters = [
        torch.nn.Parameter(buffer[place : place + torch.Size(size).numel()].view(size))
        for place, size in zip(PLACES, SIZES, strict=True)
    ]
    return SimpleNamespace(param_data=buffer, params_list=parameters[::-1])


@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_ranks_update_their_shard_of_the_buffer(ranks: int) -> None:
    given = bucket()
    for rank, runs in enumerate(rank_shards(given, ranks, lambda parameter: True)):
        shard = given.param_data.chunk(ranks)[rank]
        found = torch.cat([run.values for run in runs]) if runs else torch.empty(0)
        assert torch.equal(found, shard[shard >= 0])


def test_only_what_is_chosen_counts() -> None:
    given = bucket()
    vector = given.params_list[1]

    def is_vector(parameter: Tensor) -> bool:
        return parameter is vector

    found = rank_shards(given, 64, is_vector)
    assert [(rank, run.start, run.end) for rank, runs in enumerate(found) for run in runs] == [(16, 0, 4), (17, 4, 7)]
