"""`qsparse bench train` on the CPU: two variants of a tiny model, in processes of their own."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from pipeline.bench.results import read_csv
from pipeline.bench.train_categories import OTHER, category
from pipeline.bench.train_report import SHEETS, batch_table, best, memory_table, table
from pipeline.bench.train_variants import SHAPES, VARIANTS, Order
from tests.testing import ROOT, rank_environment


def bench_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "bench", "train", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=rank_environment()
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "train"
    folder.with_suffix(".md").write_text("<!-- bench: train -->\n<!-- end -->\n")
    variants = "dense,qsparse-bitnet,te-fp8"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--variants", variants, "--steps", "2", "--warmup-steps", "1"]
    return bench_train(*arguments, "--output", str(folder)), folder


def test_numbers_of_each_variant(results):
    _, folder = results
    rows = read_csv(folder / "train.csv").rows
    assert tuple(rows[0]) == SHEETS["train"]
    assert [row["variant"] for row in rows] == ["dense", "qsparse-bitnet", "te-fp8"]
    for row in rows[:2]:
        assert row["absent"] == ""
        per_step = SHAPES["tiny"].seq_length * int(row["micro_batch"])
        expected = per_step / (float(row["ms_per_step"]) / 1e3)
        assert float(row["tokens_per_s_per_gpu"]) == pytest.approx(expected, rel=0.02)
        assert float(row["loss"]) == pytest.approx(5.55, abs=0.2)  # ln 256 on uniform tokens
    assert rows[0]["loss"] != rows[1]["loss"]


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="about machines without Transformer Engine")
def test_absent_library_is_named(results):
    process, folder = results
    assert process.returncode == 0
    absent = read_csv(folder / "train.csv").rows[2]
    assert absent["tokens_per_s_per_gpu"] == ""
    assert absent["absent"] == "not installed: transformer_engine"
    assert "te-fp8, micro-batch 2: not installed" in process.stdout


def test_failure_of_a_variant_is_told(tmp_path):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--variants", "dense", "--data", str(tmp_path / "nothing")]
    process = bench_train(*arguments, "--output", str(tmp_path))
    assert process.returncode == 1
    assert "failed: " in read_csv(tmp_path / "train.csv").rows[0]["absent"]
    assert "nothing" in process.stdout


def test_memory_of_each_category(results):
    """Per parameter of a bf16 model: weight 2 bytes, fp32 gradient 4, master weight and two moments 12."""
    _, folder = results
    rows = read_csv(folder / "train_memory.csv").rows
    found = {row["category"]: float(row["gib"]) for row in rows if row["variant"] == "dense"}
    assert sum(found.values()) == pytest.approx(float(read_csv(folder / "train.csv").rows[0]["peak_gib"]), abs=0.1)
    assert set(found) == {"weights", "gradients", "optimizer", "codes and buffers", "activations"}


def test_longest_kernels_come_first(results):
    _, folder = results
    rows = [row for row in read_csv(folder / "train_kernels.csv").rows if row["variant"] == "dense"]
    times = [float(row["ms"]) for row in rows]
    assert 0 < len(times) <= 25
    assert times == sorted(times, reverse=True)


def test_breakdown_and_page(results):
    _, folder = results
    rows = read_csv(folder / "train_breakdown.csv").rows
    assert tuple(rows[0]) == SHEETS["train_breakdown"]
    times = {(row["variant"], row["category"]): float(row["ms"]) for row in rows}
    assert times["dense", "GEMM"] > 0
    assert times["dense", "sort, top-K"] == 0 < times["qsparse-bitnet", "sort, top-K"]
    assert (folder / "train.png").stat().st_size > 10_000
    page = folder.with_suffix(".md").read_text()
    rates = [float(row["tokens_per_s_per_gpu"]) for row in read_csv(folder / "train.csv").rows[:2]]
    assert f"| tiny | qsparse-bitnet | {rates[1]:,.0f} | {rates[1] / rates[0]:.3f} |" in page
    assert f"| tiny | dense | {rates[0]:,.0f} | 1.000 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_says_that_it_needs_a_gpu():
    result = bench_train()
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr


def test_unknown_names_are_told():
    result = bench_train("--device", "cpu", "--shapes", "tiny,7b")
    assert result.returncode == 2
    assert "--shapes 7b: expected some of tiny, 350m, 1.3b" in result.stderr


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (8, 1), (4, 2)])
def test_every_variant_is_a_valid_configuration(variant, dp, tp):
    order = Order("1.3b", variant, "cuda", 4, 2, steps=3, warmup_steps=1, data=None, dp=dp, tp=tp)
    config = order.config()
    assert config.training.global_batch_size == 8 * dp
    assert config.check_world_size(order.gpus) == dp


def row(**values) -> dict[str, str]:
    return dict.fromkeys(SHEETS["train"], "") | {"shape": "350m", **values}


def test_the_faster_micro_batch_counts():
    rows = [
        row(variant="dense", micro_batch="8", tokens_per_s_per_gpu="100", ms_per_step="1"),
        row(variant="dense", micro_batch="16", tokens_per_s_per_gpu="110", ms_per_step="2"),
        row(variant="naive", micro_batch="8", tokens_per_s_per_gpu="55", ms_per_step="2"),
        row(variant="te-fp8", micro_batch="8", absent="not installed: transformer_engine"),
    ]
    assert [one["micro_batch"] for one in best(rows)] == ["16", "8", "8"]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| 350m | dense | 110 | 1.000 |")
    assert lines[3].startswith("| 350m | naive | 55 | 0.500 |")
    memory = [
        {**row(variant="dense", micro_batch=size), "category": "weights", "gib": gib}
        for size, gib in (("8", "1.5"), ("16", "2.5"))
    ]
    assert memory_table(rows, memory).splitlines()[2] == "| 350m | dense | 1.50 | 1.50 |"  # naive has 8 only
    assert memory_table(rows[:2], memory).splitlines()[2] == "| 350m | dense | 2.50 | 2.50 |"


def test_memory_is_compared_at_equal_micro_batches():
    rows = [
        row(variant="dense", micro_batch="8", tokens_per_s_per_gpu="100", peak_gib="40"),
        row(variant="dense", micro_batch="16", tokens_per_s_per_gpu="110", peak_gib="60"),
        row(variant="block", micro_batch="16", tokens_per_s_per_gpu="132", peak_gib="45"),
    ]
    assert batch_table(rows).splitlines()[3] == "| 350m | block |  | 132 (1.20x), 45.0 GiB (-25%) |"


def test_what_the_total_time_leaves_out_is_named(tmp_path):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--variants", "dense", "--total-seconds", "0"]
    process = bench_train(*arguments, "--output", str(tmp_path))
    assert process.returncode == 0
    assert read_csv(tmp_path / "train.csv").rows[0]["absent"] == "left out: 0 seconds were over"


def test_kernels_fall_into_categories():
    expected = {
        "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "GEMM",
        "_hopper_gemm_kernel": "GEMM",
        "_gemm_kernel": "GEMM",
        "_sdd_kernel": "GEMM",
        "_sparse_dense_kernel": "GEMM",
        "ternary_gemv_kernel": "GEMM",
        "ternary_dot_kernel": "GEMM",
        "ternary_codes_kernel": "sparsify, quantize",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "void multi_tensor_apply_kernel<AdamFunctor>": "optimizer",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "_sparsify_kernel": "sparsify, quantize",
        "_fused_kernel": "sparsify, quantize",
        "_round_gradient_kernel": "sparsify, quantize",
        "_transpose_codes_kernel": "sparsify, quantize",
        "count_kernel": "sparsify, quantize",
        "_rms_norm_kernel": "norm, activation",
        "_dots_kernel": "norm, activation",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>": OTHER,
        "Memcpy DtoD (Device -> Device)": OTHER,
    }
    assert {name: category(name) for name in expected} == expected
