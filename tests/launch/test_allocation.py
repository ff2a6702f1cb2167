"""Layout against allocation, before queueing."""

import re

import pytest

from launch.allocation import Allocation, plan, warnings
from launch.cluster import ClusterProfile
from pipeline.config_loader import load_config

GPUS = ClusterProfile(gpus_per_node=8, max_nodes=16)


def test_what_fits_is_planned():
    config = load_config(None, ["parallel.tp=4", "parallel.pp=2", "training.global_batch_size=64"])
    assert plan(config, GPUS, 4) == Allocation(4, 4, 8)
    assert plan(config, GPUS, 4).slurm_nodes == "4"
    cpu = ClusterProfile(gpus_per_node=0, processes_per_node=2)
    assert plan(load_config(None, ["parallel.tp=2"]), cpu, 2, min_nodes=1).slurm_nodes == "1-2"


@pytest.mark.parametrize(
    ("overrides", "nodes", "min_nodes", "message"),
    [
        (
            ["parallel.tp=8", "parallel.pp=2"],
            1,
            None,
            "1 node of 8 ranks: 8 processes are not a multiple of parallel.tp=8",
        ),
        (
            ["parallel.tp=4", "parallel.dp=2"],
            2,
            None,
            "2 nodes of 8 ranks: parallel.tp=4 * parallel.pp=1 * parallel.cp=1 * parallel.dp=2 takes 8 processes, "
            "there are 16",
        ),
        ([], 17, None, "--nodes 17 is more than the cluster gives a job (max_nodes: 16)"),
        ([], 2, 3, "--nodes 2 --min-nodes 3: 1 <= min-nodes <= nodes is expected"),
        (["parallel.dp=16"], 2, 1, "but parallel.dp=16 fixes it; set parallel.dp=null"),
        (
            [],
            4,
            1,
            "3 nodes of 8 ranks: 24 processes make parallel.dp=24: training.global_batch_size=64 is not divisible",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides, nodes, min_nodes, message):
    config = load_config(None, ["training.global_batch_size=64", "training.micro_batch_size=1", *overrides])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(config, GPUS, nodes, min_nodes)


def test_gpus_that_are_not_there():
    cuda = load_config(None, ["run.device=cuda"])
    with pytest.raises(ValueError, match=r"run\.device=cuda needs GPUs, but the cluster profile has gpus_per_node: 0"):
        plan(cuda, ClusterProfile(gpus_per_node=0), 1)
    with pytest.raises(ValueError, match="processes_per_node: 8 is more than gpus_per_node: 4; each rank takes a GPU"):
        plan(cuda, ClusterProfile(gpus_per_node=4, processes_per_node=8), 1)


def test_tensor_parallelism_between_nodes_is_noted():
    (note,) = warnings(load_config(None, ["parallel.tp=8"]), ClusterProfile(gpus_per_node=4))
    assert note.startswith("parallel.tp=8 * parallel.cp=1 spans nodes of 4 ranks")
    assert warnings(load_config(None, ["parallel.tp=4"]), ClusterProfile(gpus_per_node=4)) == []
