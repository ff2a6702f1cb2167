"""Does the layout fit the nodes that are asked for?  Answered before a job waits in the queue for hours."""

from dataclasses import dataclass

from launch.cluster import ClusterProfile
from pipeline.config import Config


@dataclass(frozen=True)
class Allocation:
    """What a job asks for.

    Attributes:
        nodes: nodes wanted.
        min_nodes: nodes that suffice; fewer than `nodes` makes the job elastic, with fewer data-parallel replicas.
        ranks_per_node: ranks on each node.
    """

    nodes: int
    min_nodes: int
    ranks_per_node: int

    @property
    def is_elastic(self) -> bool:
        """Whether the number of nodes may differ from start to start."""
        return self.min_nodes < self.nodes

    @property
    def slurm_nodes(self) -> str:
        """Value of --nodes."""
        return f"{self.min_nodes}-{self.nodes}" if self.is_elastic else str(self.nodes)


def plan(config: Config, profile: ClusterProfile, nodes: int, min_nodes: int | None = None) -> Allocation:
    """The allocation of a run, checked.

    Raises:
        ValueError: there are not that many nodes, or the layout does not fit some number of nodes that SLURM may give;
            names keys, values and what would be right.
    """
    least = nodes if min_nodes is None else min_nodes
    if nodes < 1 or not 1 <= least <= nodes:
        raise ValueError(f"--nodes {nodes} --min-nodes {least}: 1 <= min-nodes <= nodes is expected")
    if profile.max_nodes is not None and nodes > profile.max_nodes:
        raise ValueError(f"--nodes {nodes} is more than the cluster gives a job (max_nodes: {profile.max_nodes})")
    if profile.gpus_per_node == 0 and config.run.device == "cuda":
        raise ValueError("run.device=cuda needs GPUs, but the cluster profile has gpus_per_node: 0")
    if 0 < profile.gpus_per_node < profile.ranks_per_node and config.run.device != "cpu":
        raise ValueError(
            f"processes_per_node: {profile.ranks_per_node} is more than gpus_per_node: {profile.gpus_per_node}; "
            "each rank takes a GPU"
        )
    if least < nodes and config.parallel.dp is not None:
        raise ValueError(
            f"--min-nodes {least} lets the number of replicas change, but parallel.dp={config.parallel.dp} fixes it; "
            "set parallel.dp=null"
        )
    for count in range(least, nodes + 1):
        _check(config, profile, count)
    return Allocation(nodes, least, profile.ranks_per_node)


def warnings(config: Config, profile: ClusterProfile) -> list[str]:
    """What works but is probably not meant."""
    parallel, ranks = config.parallel, profile.ranks_per_node
    if parallel.tp * parallel.cp > ranks and parallel.tp > 1:
        return [
            f"parallel.tp={parallel.tp} * parallel.cp={parallel.cp} spans nodes of {ranks} ranks: tensor parallelism "
            "over the network between nodes is slow"
        ]
    return []


def _check(config: Config, profile: ClusterProfile, nodes: int) -> None:
    ranks = nodes * profile.ranks_per_node
    try:
        config.check_world_size(ranks)
    except ValueError as error:
        per_node = profile.ranks_per_node
        plural = "s" if nodes > 1 else ""
        raise ValueError(f"{nodes} node{plural} of {per_node} rank{'s' if per_node > 1 else ''}: {error}") from None
