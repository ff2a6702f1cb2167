"""Estimates against measured runs, and against formulas worked out by hand."""

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.plan.accuracy import Comparison, compare, table
from pipeline.plan.layer_time import layer_time, product
from pipeline.plan.layout import Layout
from pipeline.plan.links import Network, layer_traffic, step_traffic
from pipeline.plan.memory import GIB, memory, saved_bytes, stage_parameters
from pipeline.plan.model_costs import activated_parameters, model_layers, total_parameters
from pipeline.plan.rates import load_rates, read_rates
from pipeline.plan.search import Cluster, estimate
from pipeline.plan.step_time import step_time
from pipeline.sizes import model_size
from tests.testing import ROOT

MEMORY_TOLERANCE, TIME_TOLERANCE = 0.10, 0.20
RUNS = compare(Path(__file__).with_name("measured.csv"), ROOT)
RATES = load_rates("h100")
BITNET = {"weights": "ternary", "activations": "int8", "sparsity": 0.5}


def config(parallel: dict | None = None, training: dict | None = None, **model) -> Config:
    shape = {
        "num_layers": 8,
        "hidden_size": 1024,
        "ffn_hidden_size": 2816,
        "num_attention_heads": 16,
        "vocab_size": 32000,
    }
    given = {
        "seq_length": 2048,
        "micro_batch_size": 2,
        "global_batch_size": 64,
        "precision": "bf16",
        **(training or {}),
    }
    return Config(
        run={"device": "cuda"}, model={**shape, **model}, parallel={"dp": 1, **(parallel or {})}, training=given
    )


def sent(config: Config, per_node: int = 8) -> dict[str, float]:
    """Bytes by kind of one layer and microbatch."""
    layer = model_layers(config).kinds[0]
    found: dict[str, float] = {}
    for item in layer_traffic(layer, config, Layout.of(config), Network(RATES, per_node)):
        found[item.kind] = found.get(item.kind, 0) + item.sent
    return found


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_measured_runs(run: Comparison) -> None:
    """The goals: memory within 10 %, step time within 20 %."""
    assert run.memory_error is not None or run.time_error is not None
    assert abs(run.memory_error or 0) < MEMORY_TOLERANCE
    assert abs(run.time_error or 0) < TIME_TOLERANCE
    assert run.name in table([run])


def test_every_rate_has_a_source() -> None:
    for rows in read_rates().values():
        for name, (value, date, source) in rows.items():
            assert value > 0 and source, name
            assert date == "assumed" or date.startswith("20"), name


def test_parameters_are_those_of_sizes() -> None:
    """pipeline.sizes counts without formats by layer: the same where every layer has one."""
    for given in (
        config(),
        config(num_query_groups=4, activation="relu2"),
        config(qsparse={**BITNET, "sub_norm": True}),
    ):
        size = model_size(given, 32000)
        assert total_parameters(given) == size.total
        assert activated_parameters(given) == size.projections * (1 - given.model.qsparse.sparsity)


def test_rules_count_layer_by_layer() -> None:
    rules = [{"match": "*.linear_fc2", "sparsity": 0.75}, {"match": "decoder.layers.0.*", "weights": "full"}]
    given = config(qsparse={**BITNET, "rules": rules})
    down, others = 2816 * 1024, 4 * 1024 * 1024 + 2 * 2816 * 1024
    assert activated_parameters(given) == 8 * (down * 0.25 + others * 0.5)
    assert stage_parameters(given, Layout.of(given), model_layers(given), 0).ternary == 8 * (down + others) - others


def test_states_take_18_bytes_and_are_sharded_over_replicas() -> None:
    for dp in (1, 4):
        given = config({"dp": dp, "distributed_optimizer": dp > 1}, qsparse=BITNET)
        parts, count = memory(given, Layout.of(given), model_layers(given), RATES), total_parameters(given)
        assert parts["weights"] + parts["gradients"] == 6 * count
        assert parts["master weights"] + parts["Adam moments"] == pytest.approx(12 * count / dp)
        assert parts["codes, stacks"] == model_size(given, 32000).projections


def test_weights_kept_in_bf16_take_two_bytes_and_save_a_pass() -> None:
    """Of ternary weights with an exact backward pass: not the up projections here."""
    rules = [{"match": "*.linear_fc1", "gradients": "e4m3"}]
    moe = {"num_experts": 4, "first_dense_layers": 4}
    down, attention = 2816 * 1024, 4 * 1024 * 1024
    for experts, copies in ((None, 0), (moe, 4 * 3)):
        given = config({"tp": 2, "sequence_parallel": True}, qsparse={**BITNET, "rules": rules}, moe=experts)
        kept = given.model_copy(update={"run": given.run.model_copy(update={"keep_bf16_weights": True})})
        layers, layout = model_layers(given), Layout.of(given)
        less, more = (memory(one, layout, layers, RATES)["codes, stacks"] for one in (given, kept))
        assert more - less == 2 * (8 * attention + (8 + copies) * down) / 2
        times = [layer_time(layers.kinds[0], one, layout, RATES)["sparsify, quantize"] for one in (given, kept)]
        assert times[0] - times[1] == pytest.approx(3 * (attention + down) / 2 / RATES.bandwidth)


def test_experts_in_bf16_are_stacked_in_whole_tiles() -> None:
    """Two bytes per parameter more, none where they run one after the other; tokens are padded, too."""
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 1000}
    found = {}
    for execution in ("grouped", "sequential"):
        given = config({"ep": 2, "dp": 2}, moe={**moe, "execution": execution})
        layers, layout = model_layers(given), Layout.of(given)
        found[execution] = (
            memory(given, layout, layers, RATES)["codes, stacks"],
            saved_bytes(layers.kinds[0], given, layout),
        )
    stacked = 8 * 2 * 3 * 1024 * 1024  # layers, experts of a rank, gate, up and down, hidden by the padded width
    assert found["grouped"][0] == 2 * stacked and found["sequential"][0] == 0
    copies = 2 * 2 * 2048
    rows = copies + 2 * 127
    # the input, gate and up, and what the activation makes of them
    per_row, per_copy = 2 * (1024 + 3 * 1024), 2 * (1024 + 3 * 1000)
    assert found["grouped"][1] - found["sequential"][1] == rows * per_row - copies * per_copy


def test_pipeline_ranks_hold_as_many_microbatches_as_follow() -> None:
    """1F1B: p, p - 1, ... 1; interleaved: (1 + (p - 1) / (p v)) p on the first (arXiv 2205.05198 sec. 4.2.3)."""
    plain = Layout.of(config({"pp": 4}))
    assert [plain.in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    chunked = Layout.of(config({"pp": 4, "vpp": 2}))
    assert chunked.in_flight(0) == (2 * 3 + 4 + 1) / 2 == pytest.approx((1 + 3 / 8) * 4)
    assert Layout.of(config({"pp": 4}, {"global_batch_size": 4})).in_flight(0) == 2  # there are only two
    assert chunked.stage((0, 0, 1, 1, 1, 1, 1, 1), 0) == {0: 1, 1: 1}


def test_tensor_parallelism_sends_what_the_paper_says() -> None:
    """Four all-reduces of s b h a layer, or as many gathers and scatters (arXiv 2205.05198 sec. 4.2.2)."""
    activations = 2 * 2048 * 2 * 1024  # s b h in bf16
    all_reduces = 4 * 2 * activations * 3 / 4
    assert sum(sent(config({"tp": 4})).values()) == all_reduces
    sequence = sent(config({"tp": 4, "sequence_parallel": True}))
    again = 2 * activations * 3 / 4  # inputs gathered again for the weight gradients
    assert sum(sequence.values()) == all_reduces + again
    codes = sent(config({"tp": 4, "sequence_parallel": True}, qsparse={**BITNET, "pattern": "block"}))
    assert codes["tensor: gathers of inputs"] == 4 * (2048 * 2 * (1024 + 4)) * 3 / 4
    assert codes["tensor: reductions"] == sequence["tensor: reductions"]
    eight_bit = {**BITNET, "pattern": "block", "gradients": "e4m3"}
    rounded = sent(config({"tp": 4, "sequence_parallel": True}, qsparse=eight_bit))
    assert rounded["tensor: gathers of gradients"] == 2 * (2048 * 2 * (1024 + 4)) * 3 / 4
    assert codes["tensor: gathers of gradients"] == 2 * activations * 3 / 4


def test_full_recomputation_repeats_what_the_forward_pass_sends() -> None:
    for parallel in ({"tp": 4}, {"tp": 4, "sequence_parallel": True}):
        once, again = sent(config(parallel)), sent(config(parallel, {"recompute": "full"}))
        activations = 2 * 2048 * 2 * 1024
        assert sum(again.values()) - sum(once.values()) == 2 * 2 * activations * 3 / 4  # two all-reduces, or as much


def test_experts_send_codes_one_way_and_bf16_three_ways() -> None:
    moe = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 512}
    found = sent(config({"ep": 4, "dp": 4}, qsparse=BITNET, moe=moe))
    copies = 2048 * 2 * 2 * 3 / 4
    assert found["experts: dispatch"] == copies * 1040  # 1024 codes and a scale in words of 16 bytes
    assert found["experts: outputs, gradients"] == 3 * copies * 2 * 1024
    assert sent(config({"ep": 4, "dp": 4}, moe=moe))["experts: dispatch"] == copies * 2 * 1024


def test_data_parallelism_sends_gradients_and_parameters() -> None:
    """ZeRO-1 reduces 4 bytes and gathers 2 per parameter; without it gradients go round twice."""
    for is_sharded, per_parameter in ((True, 4 + 2), (False, 4 * 2)):
        given = config({"dp": 8, "distributed_optimizer": is_sharded}, qsparse=BITNET)
        found = step_traffic(given, Layout.of(given), model_layers(given), 0, Network(RATES, 8))
        assert sum(item.sent for item in found) == pytest.approx(per_parameter * total_parameters(given) * 7 / 8)
    gathered = next(item for item in found if "gradients" in item.kind)
    assert gathered.with_2bit == gathered.sent


def test_parameters_in_codes() -> None:
    """A quarter of a byte per ternary weight; the others dealt out by the rank that has most of them, then gathered."""
    option = {"distributed_optimizer": True, "ternary_param_gather": True}
    for vocabulary in (32000, 128):
        given = config({"dp": 8, **option}, qsparse=BITNET, vocab_size=vocabulary)
        found = step_traffic(given, Layout.of(given), model_layers(given), 0, Network(RATES, 8))
        (parameters,) = (item for item in found if item.kind == "data: parameters")
        total, ternary = total_parameters(given), model_size(given, vocabulary).projections
        dealt = min(total - ternary, total / 8)
        assert parameters.sent == (ternary / 4 + 2 * (total - ternary) + 2 * dealt) * 7 / 8
        assert (parameters.sent, parameters.in_bf16) == (parameters.with_2bit, 2 * total * 7 / 8)
        without = config({"dp": 8, "distributed_optimizer": True}, qsparse=BITNET, vocab_size=vocabulary)
        assert seconds(given) < seconds(without)


def seconds(config: Config) -> float:
    """Of a step on GPUs that the network connects."""
    return sum(step_time(config, Layout.of(config), model_layers(config), RATES, 1)[0].values())


def test_links_inside_and_between_nodes() -> None:
    network, size = Network(RATES, 8), 1e9
    assert network.collective(size, 8, 1) == pytest.approx(size / RATES.nvlink + RATES.latency_node)
    assert network.collective(size, 16, 8) == pytest.approx(size / RATES.network + 16 * RATES.latency_network)
    together = min(RATES.nvlink, 8 * RATES.network)
    assert network.collective(size, 16, 1) == pytest.approx(size / together + 2 * RATES.latency_network)
    assert network.collective(size, 1, 8) == network.collective(0.0, 8, 8) == 0
    outside = size * 8 / 15
    assert network.all_to_all(size, 16, 1) == pytest.approx(outside / RATES.network + 2 * RATES.latency_network)


def test_a_product_of_whole_waves_runs_at_the_rate() -> None:
    m, n, k = 128 * 12, 128 * 11, 4096  # 132 tiles
    assert product(RATES, RATES.gemm_bf16, m, n, k, 0) == pytest.approx(2 * m * n * k / RATES.gemm_bf16)
    assert product(RATES, RATES.gemm_bf16, m + 1, n, k, 0) > 1.9 * product(RATES, RATES.gemm_bf16, m, n, k, 0)
    assert product(RATES, RATES.gemm_bf16, 16, 16, 16, 1e9) == 1e9 / RATES.bandwidth


def test_the_bubble_is_that_of_1f1b_and_interleaving_divides_it() -> None:
    """(p - 1) / (m v) of the ideal time (arXiv 2104.04473 sec. 2.2)."""
    for vpp in (1, 2):
        given = config({"pp": 4, "vpp": vpp})
        seconds, _ = step_time(given, Layout.of(given), model_layers(given), RATES, 8)
        once = seconds["optimizer"] + RATES.step_overhead
        ideal = sum(seconds.values()) - seconds["pipeline bubble"] - once
        exposed = 0.01 * ideal  # gradients and activations between stages
        assert seconds["pipeline bubble"] == pytest.approx(ideal * 3 / (32 * vpp), abs=exposed)


def test_recomputation_trades_time_for_memory() -> None:
    cluster = Cluster(1, 8, "h100", RATES, 79)
    none, up, full = (
        estimate(config(training={"recompute": how}, qsparse={**BITNET, "sub_norm": True}), cluster)
        for how in ("none", "up_projection", "full")
    )
    assert none.gib > up.gib > full.gib
    assert none.time["GEMM"] < up.time["GEMM"] < full.time["GEMM"]
    assert none.gib < sum(none.memory.values()) / GIB + 1e-9
