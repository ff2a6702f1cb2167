"""Checks of single MoE layers on two expert-parallel processes; run with torchrun, argument: a JSON file for results.

Each `check_*` function raises on a rank where something is wrong; the file maps its name to the tracebacks of all.
"""

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline.cpu_backend import install

if __name__ == "__main__":  # megatron-core may be imported only after this
    install(cpu=True)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_capacity
from torch import Tensor

from moe.dispatcher import ExpertInput
from moe.wire import row_bytes
from pipeline.checkpoint import Checkpoints, Progress
from pipeline.config import Config
from pipeline.learner import Learner
from pipeline.model import build_model, unwrap
from pipeline.upcycle import load_dense
from pipeline.world import current_world, initialize_layout
from tests.moe.cases import CLASSIC, DENSE, FULL, NO_SUB_NORM, case
from tests.moe.plain_moe import PlainMoE
from tests.testing import TextWindows


@contextmanager
def moe_layer(moe: dict, precision: str = "fp64", parallel: dict | None = None, **model: Any) -> Iterator[Any]:
    """The first MoE layer of a small model under EP = 2, without losses on its router."""
    values = case(FULL, precision, {**CLASSIC, "balancing": "none", **moe}, {"ep": 2} if parallel is None else parallel)
    values["model"].update(model)
    config = Config(**values)
    initialize_layout(config)
    try:
        built = build_model(config, vocab_size=256)
        yield next(layer for layer in unwrap(built.chunks[0]).decoder.layers if hasattr(layer.mlp, "router")).mlp
    finally:
        parallel_state.destroy_model_parallel()


def tokens_of(rank: int, length: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[length, 1, width], different on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(length, 1, width, generator=generator, dtype=torch.float64).to(dtype)


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of rank 0, then those of rank 1, as leaves."""
    everyone: list[list[Tensor]] = [[], []]
    dist.all_gather_object(everyone, [tensor.detach() for tensor in tensors])
    return [tensor.clone().requires_grad_() for part in everyone for tensor in part]


def compare_with_plain(layer: Any, lengths: tuple[int, int], *, positive: bool = False) -> PlainMoE:
    """Forward and all gradients of `layer` against the plain mixture, for lengths[rank] tokens on each rank."""
    experts = layer.experts.local_experts
    capacity = layer.config.moe_expert_capacity_factor
    plain = PlainMoE(
        router=layer.router.weight.detach().clone().requires_grad_(),
        up=gathered([expert.linear_fc1.weight for expert in experts]),
        down=gathered([expert.linear_fc2.weight for expert in experts]),
        gain=gathered([expert.linear_fc2.sub_norm_weight for expert in experts]),
        top_k=layer.config.moe_router_topk,
        sparsity=FULL["sparsity"],
    )
    rank, width = dist.get_rank(), layer.config.hidden_size
    for parameter in layer.parameters():
        parameter.grad = None
    inputs, outputs = [], []
    for owner, length in enumerate(lengths):
        x = tokens_of(owner, length, width)
        inputs.append((x.abs() if positive else x).requires_grad_())
        if capacity:
            plain.capacity = get_capacity(length * plain.top_k, len(plain.up), capacity)
        outputs.append(plain(inputs[-1][:, 0]))
    torch.cat(outputs).square().sum().backward()
    mine = inputs[rank].detach().clone().requires_grad_()
    output, _ = layer(mine)
    output.square().sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(output[:, 0], outputs[rank], **close)
    torch.testing.assert_close(mine.grad, inputs[rank].grad, **close)
    count = len(experts)
    for local, expert in enumerate(experts):
        e = rank * count + local
        for found, expected in (
            (expert.linear_fc1.weight, plain.up[e]),
            (expert.linear_fc2.weight, plain.down[e]),
            (expert.linear_fc2.sub_norm_weight, plain.gain[e]),
        ):
            torch.testing.assert_close(found.grad, expected.grad, **close)
    router = layer.router.weight.grad.clone()
    dist.all_reduce(router)
    torch.testing.assert_close(router, plain.router.grad, rtol=1e-6, atol=1e-9)  # its softmax is float32
    assert float(router.abs().max()) > 1e-6
    return plain


def check_gradients_against_plain_pytorch() -> None:
    for options in ({}, {"dispatcher": "allgather"}, {"dispatch": "full"}, {"execution": "grouped"}):
        with moe_layer(options) as layer:
            compare_with_plain(layer, (12, 12))


def check_odd_token_counts_and_experts_without_tokens() -> None:
    for lengths in ((5, 3), (1, 2)):
        for execution in ("sequential", "grouped"):
            with moe_layer({"execution": execution}) as layer:
                compare_with_plain(layer, lengths)


def check_fine_grained_experts() -> None:
    with moe_layer({"num_experts": 64, "top_k": 8, "ffn_hidden_size": 16}) as layer:
        compare_with_plain(layer, (9, 9))


def check_all_tokens_to_two_experts_of_one_rank() -> None:
    for execution in ("sequential", "grouped"):
        with moe_layer({"execution": execution}) as layer:
            with torch.no_grad():  # tokens are positive: expert 0 comes first for every token, expert 1 second
                layer.router.weight.copy_(-0.1 * torch.arange(8.0).unsqueeze(1).expand(8, 64))
            plain = compare_with_plain(layer, (7, 4), positive=True)
            assert all(not gate_up.grad.any() for gate_up in plain.up[2:])


def check_capacity_drops_what_overflows() -> None:
    with moe_layer({"capacity_factor": 0.5}) as layer:
        layer.router.load.counting = True
        compare_with_plain(layer, (16, 16))
        sums = layer.router.load.take(torch.device("cpu"))
        assert sums[:8].max() <= 2  # 16 tokens, two experts each, eight experts, half of the even share of four
        assert sums[8] == 16


def check_codes_and_floats_give_the_same_bits() -> None:
    for dispatcher in ("alltoall", "allgather"):
        found = {}
        for dispatch in ("codes", "full"):
            with moe_layer({"dispatcher": dispatcher, "dispatch": dispatch}, "bf16", hidden_size=256) as layer:
                layer.train()
                x = tokens_of(dist.get_rank(), 24, 256, torch.bfloat16).requires_grad_()
                with counted_bytes() as sent:
                    output, _ = layer(x)
                forward = list(sent)
                output.float().square().sum().backward()
                grads = [parameter.grad for parameter in layer.parameters()]
                found[dispatch] = (output, x.grad, grads, forward, sent[len(forward) :])
        codes, full = found["codes"], found["full"]
        assert torch.equal(codes[0], full[0])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(codes[2], full[2], strict=True))
        # Sums of a token's copies may run in another order.
        torch.testing.assert_close(codes[1], full[1], rtol=2**-7, atol=2**-10)
        if dispatcher == "alltoall":
            rows = full[3][0] // (256 * 2)
            assert codes[3][0] == rows * row_bytes(256) == rows * 272
            assert codes[3][1:] == full[3][1:]  # probabilities and, back, outputs
            assert 0 < rows <= 48


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that each all-to-all of this rank is given to send, in order."""
    sent: list[int] = []
    real = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(input.numel() * input.element_size())
        return real(output, input, *args, **kwargs)

    with patch.object(dist, "all_to_all_single", counting):
        yield sent


def check_a_probability_before_sub_norm_would_be_lost() -> None:
    with moe_layer({}, parallel={}) as layer:
        x = tokens_of(0, 16, 64)[:, 0]
        with torch.no_grad():  # so large that the norm's epsilon does not matter
            for expert in layer.experts.local_experts:
                expert.linear_fc1.weight.mul_(100.0)
        counts, probs = torch.full((8,), 2), torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
        stock = [SequentialMLP.forward(layer.experts, x, counts, p)[0] for p in (probs, probs / 2)]
        torch.testing.assert_close(stock[0], stock[1], rtol=0.0, atol=1e-3 * float(stock[0].abs().max()))
        ours = [layer.experts(ExpertInput(x), counts, p)[0] for p in (probs, probs / 2)]
        torch.testing.assert_close(ours[0], 2 * ours[1], rtol=1e-12, atol=0.0)
        grads = []
        for forward in (SequentialMLP.forward, type(layer.experts).forward):
            leaf = probs.clone().requires_grad_()
            tokens = x if forward is SequentialMLP.forward else ExpertInput(x)
            forward(layer.experts, tokens, counts, leaf)[0].square().sum().backward()
            grads.append(float(leaf.grad.abs().max()))
        assert grads[0] < 1e-3 * grads[1]


def check_grouped_experts_are_sequential_ones_with_8_bit_gradients() -> None:
    found = []
    for execution in ("sequential", "grouped"):
        values = case({**FULL, "gradients": "e4m3"}, "fp32", {**CLASSIC, "execution": execution}, {"ep": 2})
        config = Config(**values)
        initialize_layout(config)
        built = build_model(config, vocab_size=256)
        layer = next(layer.mlp for layer in unwrap(built.chunks[0]).decoder.layers if hasattr(layer.mlp, "router"))
        x = tokens_of(dist.get_rank(), 20, 64, torch.float32).requires_grad_()
        layer(x)[0].square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
        parallel_state.destroy_model_parallel()
    for mine, theirs in zip(*found, strict=True):  # a SubLN gain's gradient is summed in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def check_an_upcycled_mixture_computes_what_the_dense_model_did() -> None:
    moe = {"num_experts": 4, "top_k": 2, "layer_frequency": 2}
    with dense_checkpoint(FULL) as (folder, dense):
        for layout, experts in (({"ep": 2}, moe), ({"pp": 2}, {**moe, "scores": "sigmoid"})):
            with learner_of(FULL, experts, layout) as (learner, data):
                upcycle(learner, folder)
                # The router's softmax is float32, so k probabilities sum to one within 1e-7.
                assert abs(learner.evaluate(data) - dense) < 1e-5 * dense
                first, second = learner.step(3).loss, learner.step(4).loss
                assert second < first + 0.5


def check_sparsity_warms_up_on_top_of_an_upcycled_mixture() -> None:
    warming = {**NO_SUB_NORM, "sparsity_warmup": {"steps": 4}, "quantization_warmup": {"steps": 4}}
    with dense_checkpoint(DENSE) as (folder, dense), learner_of(warming, CLASSIC | WIDE, {"ep": 2}) as (learner, data):
        upcycle(learner, folder)
        assert abs(learner.evaluate(data) - dense) < 1e-5 * dense  # nothing is sparse or quantized yet
        losses = [learner.step(step).loss for step in range(8)]
        assert losses[-1] < losses[0]
        full = [learner.model.schedule.sparsity(layer.module.format) for layer in learner.model.layers]
        assert full == [warming["sparsity"]] * len(full)


WIDE = {"ffn_hidden_size": None}
"""Experts as wide as the dense FFN they are copied from."""


@contextmanager
def dense_checkpoint(qsparse: dict) -> Iterator[tuple[Path, float]]:
    """A checkpoint of a dense model after three steps under TP = 2, and its held-out loss."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    with learner_of(qsparse, None, {"tp": 2}) as (learner, data):
        for step in range(3):
            learner.step(step)
        Checkpoints(Path(folder[0]), learner.config.checkpoint).save(learner.chunks, learner.optimizer, Progress(3))
        loss = learner.evaluate(data)
    try:
        yield Path(folder[0]), loss
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])


@contextmanager
def learner_of(qsparse: dict, moe: dict | None, layout: dict) -> Iterator[tuple[Learner, TextWindows]]:
    """A model in training and its data."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of another shape without a schedule, as in the checks above
    config = Config(**case(qsparse, "fp64", moe, layout))
    initialize_layout(config)
    data = TextWindows(config.training.seq_length)
    learner = Learner(config, current_world(config), data, vocab_size=256)
    try:
        yield learner, data
    finally:
        learner.close()
        parallel_state.destroy_model_parallel()


def upcycle(learner: Learner, folder: Path) -> None:
    load_dense(Checkpoints(folder, learner.config.checkpoint).require_latest(), learner.chunks)
    learner.optimizer.reload_model_params()


def main(output: Path) -> None:
    """Run every check on all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))  # a rank that fails alone must not hang the other
    results = {}
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        problem = ""
        try:
            check()
        except Exception:
            problem = traceback.format_exc()
            print(name, dist.get_rank(), problem, flush=True)
        everyone = ["", ""]
        dist.all_gather_object(everyone, problem)
        results[name] = "\n".join(filter(None, everyone))
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
