"""The wire format, the counts of routers, the figure made of them, and the configuration's errors."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.config import MoEConfig
from moe.dispatcher import DispatcherError, check_dispatcher
from moe.load import LayerLoad, RouterLoad, load_metrics
from moe.wire import pack, row_bytes, unpack
from pipeline.config import Config
from pipeline.metrics import MetricsLog, metric_info, read_metrics
from pipeline.moe_figures import expert_load, plot_expert_load
from pipeline.sizes import model_size
from qsparse_layers.linear_call import Codes
from tests.moe.cases import FULL, case


@pytest.mark.parametrize(("tokens", "features"), [(5, 64), (1, 7), (0, 32), (3, 4096)])
def test_a_row_holds_codes_and_scale(tokens: int, features: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-128, 128, (tokens, features), generator=generator, dtype=torch.int8)
    scale = torch.rand(tokens, 1, generator=generator)
    rows = pack(Codes(values, scale))
    assert rows.shape == (tokens, row_bytes(features))
    assert row_bytes(features) % 16 == 0
    assert features + 4 <= row_bytes(features) < features + 20
    back = unpack(rows, features)
    assert torch.equal(back.values, values)
    assert torch.equal(back.scale, scale)


def test_counts_are_those_of_a_loop_over_tokens() -> None:
    logits = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(2))
    routing = torch.zeros(12, 4, dtype=torch.bool).scatter(1, logits.view(12, 4).topk(2).indices, True)
    routing[3] = False  # dropped
    load = RouterLoad(num_experts=4, top_k=2)
    load.add(logits, routing)
    load.counting = True
    with torch.no_grad():
        load.add(logits, routing)  # the first pass of a recomputed layer
    load.add(logits, routing)
    found = LayerLoad.from_sums("layer", load.take(torch.device("cpu")).tolist(), top_k=2)
    entropy = z = 0.0
    for row in logits.view(12, 4).tolist():
        exponentials = [math.exp(value) for value in row]
        total = sum(exponentials)
        entropy -= sum(e / total * math.log(e / total) for e in exponentials) / 12
        z += math.log(total) ** 2 / 12
    assert found.tokens == tuple(routing.sum(0).tolist())
    assert found.dropped_share == pytest.approx(2 / 24)
    assert found.entropy == pytest.approx(entropy, rel=1e-6)
    assert found.z_loss == pytest.approx(z, rel=1e-6)
    assert found.imbalance == pytest.approx(max(found.tokens) / (22 / 4))
    assert load.take(torch.device("cpu")).tolist() == [0.0] * 7


def test_metrics_are_known_and_drawn(tmp_path: Path) -> None:
    layers = [LayerLoad(f"decoder.layers.{n}.mlp", (6.0, 2.0 * n, 0.0, 0.0), 0.0, 1.0, 2.0) for n in (1, 3)]
    record = load_metrics(layers)
    assert record["moe/imbalance"] == pytest.approx((6 / 2 + 6 / 3) / 2)
    assert record["moe/max_imbalance"] == pytest.approx(3.0)
    for name in record:
        assert metric_info(name).meaning
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(record, 1)
        log.write({"val/loss": 1.0}, 1)
        log.write(record, 10)
    steps, grids = expert_load(read_metrics(tmp_path / "metrics.jsonl"))
    assert steps == [1, 10]
    np.testing.assert_allclose(grids["decoder.layers.1.mlp"][:, 1], [3.0, 1.0, 0.0, 0.0])
    path = plot_expert_load(tmp_path / "metrics.jsonl", tmp_path / "figures")
    assert path is not None
    assert path.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "dense.jsonl").write_text(json.dumps({"step": 1, "time_ms": 1, "train/loss": 2.0}) + "\n")
    assert plot_expert_load(tmp_path / "dense.jsonl", tmp_path) is None


def test_active_parameters_count_shared_and_chosen_experts() -> None:
    moe = {"num_experts": 64, "top_k": 8, "ffn_hidden_size": 16, "shared_ffn_hidden_size": 32, "first_dense_layers": 1}
    size = model_size(Config(**case(FULL, "fp32", moe)), 256)
    attention, dense, shared, expert = 64 * 16 * (2 * 4 + 2 * 2), 3 * 64 * 96, 3 * 64 * 32, 3 * 64 * 16
    assert size.active_projections == 4 * attention + dense + 3 * (shared + 8 * expert)
    assert size.projections == 4 * attention + dense + 3 * (shared + 64 * expert)


def test_layers_with_experts() -> None:
    moe = MoEConfig(first_dense_layers=1, layer_frequency=2)
    assert [number for number in range(7) if moe.is_moe_layer(number)] == [1, 3, 5]


@pytest.mark.parametrize(
    ("moe", "parallel", "message"),
    [
        ({"balancing": "bias"}, {}, "balancing=bias needs scores=sigmoid, not softmax"),
        ({"top_k": 9}, {}, "top_k=9 is larger than num_experts=8"),
        ({"dispatcher": "flex"}, {"ep": 2}, "model.moe.dispatcher=flex needs GPUs and the package deep_ep"),
        ({}, {"tp": 2, "sequence_parallel": True}, "alltoall with parallel.etp=2 needs GPUs"),
        ({"first_dense_layers": 4}, {}, "leaves no layer of model.num_layers=4 with experts"),
        (
            {"shared_ffn_hidden_size": 33, "dispatcher": "allgather"},
            {"tp": 2, "sequence_parallel": True},
            "shared_ffn_hidden_size=33 is not divisible by parallel.tp=2",
        ),
    ],
)
def test_mistakes_are_named(moe: dict, parallel: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**case({}, "fp32", {"num_experts": 8, **moe}, parallel))


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="DeepEP is installed")
def test_a_dispatcher_without_its_package_is_named() -> None:
    check_dispatcher("alltoall")
    with pytest.raises(DispatcherError, match=r"model\.moe\.dispatcher=flex needs the package deep_ep"):
        check_dispatcher("flex")


@pytest.mark.parametrize(
    ("moe", "load", "message"),
    [
        ({}, None, "checkpoint.upcycle=true needs checkpoint.load"),
        (None, "x", "checkpoint.upcycle=true needs model.moe"),
        ({"ffn_hidden_size": 48}, "x", "model.moe.ffn_hidden_size=48 is not model.ffn_hidden_size=96"),
        ({"shared_ffn_hidden_size": 32}, "x", "a dense model has nothing for a shared expert"),
    ],
)
def test_upcycling_mistakes_are_named(moe: dict | None, load: str | None, message: str) -> None:
    values = case({}, "fp32", moe)
    with pytest.raises(ValueError, match=message):
        Config(**values, checkpoint={"upcycle": True, "load": load})
