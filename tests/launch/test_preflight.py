"""The preflight: judgements on made-up measurements, and real ones of two processes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.preflight import node_names
from pipeline.preflight_report import RankFacts, find_problems, render_report
from tests.testing import ROOT

GB = 2**30


def facts(rank: int, node: str, **changes) -> RankFacts:
    found = RankFacts(
        rank=rank, node=node, device="H100", gpus=2, memory_bytes=80 * GB, free_memory_bytes=79 * GB,
        gemm_tflops=700.0, local_gigabytes_per_s=300.0, neighbours={}, global_gigabytes_per_s=90.0, sums_right=True,
        clock_skew_s=0.001, disk_megabytes_per_s=900.0, disk_free_bytes=1000 * GB, disk_problem="",
        versions={"torch": "2.11", "python": "3.12"},
    )  # fmt: skip
    return replace(found, **changes)


def ring(rates: dict[tuple[str, str], float]) -> list[RankFacts]:
    """One rank per node, with the given rates between nodes."""
    nodes = sorted({node for pair in rates for node in pair})
    neighbours = {
        node: {other: rate for pair, rate in rates.items() if node in pair for other in pair if other != node}
        for node in nodes
    }
    return [facts(rank, node, gpus=1, neighbours=neighbours[node]) for rank, node in enumerate(nodes)]


GOOD = [facts(0, "a"), facts(1, "a"), facts(2, "b"), facts(3, "b"), facts(4, "c"), facts(5, "c")]


def test_equal_nodes_pass():
    assert find_problems(GOOD) == []
    assert render_report(GOOD, []).splitlines()[-1] == "preflight passed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 1}, "1 GPUs instead of 2"),
        ({"memory_bytes": 40 * GB, "free_memory_bytes": 40 * GB}, f"rank 2: memory {40 * GB} bytes, elsewhere"),
        ({"free_memory_bytes": 50 * GB}, "rank 2: 30.0 GiB of its GPU are taken by another process"),
        ({"device": "A100"}, "rank 2: device A100, elsewhere H100"),
        ({"gemm_tflops": 400.0}, "rank 2: matrix products at 400 TFLOP/s, median 700"),
        ({"local_gigabytes_per_s": 100.0}, "all-reduce within the node at 100 GB/s, median 300"),
        ({"sums_right": False}, "rank 2: an all-reduce gave a wrong sum"),
        ({"clock_skew_s": -3.0}, "the clock is -3.0 s from that of rank 0"),
        ({"disk_problem": "/x cannot be written: Read-only"}, "/x cannot be written: Read-only"),
        ({"disk_free_bytes": 4 * GB}, "only 4.0 GiB are free in the shared folder"),
        ({"versions": {"torch": "2.10", "python": "3.12"}}, "torch is 2.10, elsewhere 2.11"),
        ({"versions": {"torch": "2.11"}}, "python is not installed, elsewhere 3.12"),
    ],
)
def test_the_bad_node_is_named(changes, message):
    (problem,) = find_problems([replace(fact, **changes) if fact.rank == 2 else fact for fact in GOOD])
    assert problem.node == "b"
    assert problem.message.startswith(message)
    report = render_report(GOOD, [problem])
    assert report.splitlines()[-2:] == [f"BAD b: {problem.message}", "preflight failed on b"]


def test_a_slow_node_is_slow_in_both_of_its_pairs():
    found = find_problems(ring({("a", "b"): 50, ("b", "c"): 10, ("c", "d"): 10, ("d", "e"): 50, ("e", "a"): 50}))
    assert [(problem.node, problem.message) for problem in found] == [
        ("c", "all-reduce with b at 10 GB/s, median 50"),
        ("c", "all-reduce with d at 10 GB/s, median 50"),
    ]


def test_a_slow_link_names_both_ends():
    found = find_problems(ring({("a", "b"): 50, ("b", "c"): 10, ("c", "d"): 50, ("d", "a"): 50}))
    assert {problem.node for problem in found} == {"b", "c"}


def test_expected_gpus():
    assert find_problems(GOOD, expected_gpus=2) == []
    assert {problem.node for problem in find_problems(GOOD, expected_gpus=8)} == {"a", "b", "c"}


def test_nodes_that_never_came_are_named_by_slurm():
    assert node_names({"QSPARSE_NODES": "n1 n7"}, 2) == ["n1", "n7"]
    assert node_names({}, 2) == ["node 0", "node 1"]


def preflight(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "preflight", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=90, check=False)


def test_two_real_ranks(tmp_path):
    result = preflight("--nproc", "2", "--folder", str(tmp_path), "--output", str(tmp_path / "out"))
    found = json.loads((tmp_path / "out/preflight.json").read_text())
    ranks = found["ranks"]
    messages = [problem["message"] for problem in found["problems"]]
    # What a full or busy machine may have; nothing else is wrong with this one.
    assert all("are free" in message or "matrix products at" in message for message in messages), result.stdout
    assert result.returncode == (5 if messages else 0), result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("preflight failed on" if messages else "preflight passed")
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert all(rank["sums_right"] and rank["gemm_tflops"] > 0 and rank["disk_megabytes_per_s"] > 0 for rank in ranks)
    assert ranks[0]["versions"] == ranks[1]["versions"]
    assert ranks[0]["versions"]["torch"]
    assert abs(ranks[1]["clock_skew_s"]) < 0.5  # one machine, one clock
    assert list(tmp_path.glob(".preflight*")) == []


def test_gpus_that_are_missing_and_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    options = ("--folder", str(tmp_path / "file/x"), "--output", str(tmp_path / "out"))
    result = preflight("--gpus", "8", *options, SLURMD_NODENAME="n9", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 5, result.stderr
    assert "BAD n9: 0 GPUs instead of 8\n" in result.stdout
    assert f"BAD n9: {tmp_path}/file/x cannot be written: Not a directory\n" in result.stdout
    assert (tmp_path / "out/bad-nodes").read_text() == "n9\n"


def test_a_node_that_does_not_come(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    endpoint = ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", f"127.0.0.1:{port}")
    result = preflight(*endpoint, "--timeout", "4", "--output", str(tmp_path), QSPARSE_NODES="n1 n2")
    assert result.returncode == 5, result.stderr
    assert result.stdout == "BAD n2: 1 of 1 ranks did not come\npreflight failed on n2\n"
    assert (tmp_path / "bad-nodes").read_text() == "n2\n"
