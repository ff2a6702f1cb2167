"""Layouts of a model on a cluster: every sensible one is estimated, those that fit are ranked by speed.

Keys that the user gave on the command line are held; those of the file are one candidate among others.  Searched: TP
inside a node, PP and chunks, EP with whole or sharded experts, micro-batch, recompute.  Not searched but set: sequence
parallelism with TP, the distributed optimizer and its overlap with DP, a CUDA graph where it is allowed.  Rules of
`pipeline.config_checks` say what is possible, as for a run.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pipeline import yaml12
from pipeline.config import Config
from pipeline.config_checks import find_violations
from pipeline.config_loader import differences
from pipeline.plan.layout import Layout
from pipeline.plan.links import Traffic
from pipeline.plan.memory import GIB, in_torch, memory
from pipeline.plan.model_costs import Layers, model_layers
from pipeline.plan.rates import Rates, load_rates
from pipeline.plan.step_time import step_time
from pipeline.sizes import BF16_PEAK_FLOPS, flops_per_token

ASSUMED_VOCABULARY = 32000


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind."""

    gpus: int
    per_node: int
    gpu: str
    rates: Rates
    memory_gib: float
    """Of one GPU."""

    def __post_init__(self) -> None:
        for option, value in (("--gpus", self.gpus), ("--nodes-of", self.per_node), ("--gpu-memory", self.memory_gib)):
            if value <= 0:
                raise ValueError(f"{option} {value:g}: a positive number is expected")


@dataclass(frozen=True)
class Estimate:
    """One layout."""

    config: Config
    layout: Layout
    memory: dict[str, float]
    """Bytes by category on the fullest GPU."""
    time: dict[str, float]
    """Seconds of a step by category."""
    traffic: list[Traffic]

    @property
    def gib(self) -> float:
        """Memory of the fullest GPU."""
        return sum(self.memory.values()) / GIB

    @property
    def seconds(self) -> float:
        """Of one optimizer step."""
        return sum(self.time.values())

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        training = self.config.training
        return training.global_batch_size * training.seq_length / self.seconds / self.layout.gpus

    @property
    def mfu(self) -> float:
        """Operations of the dense model over the dense bf16 peak."""
        flops = flops_per_token(self.config, self.config.model.vocab_size or ASSUMED_VOCABULARY)
        return flops * self.tokens_per_second / BF16_PEAK_FLOPS["H100"]


@dataclass(frozen=True)
class Plan:
    """Answer of a search."""

    configured: Estimate | str
    """The layout of the file and its overrides, or why it is impossible."""
    best: list[Estimate]
    """Those that fit, fastest first."""
    too_large: list[Estimate]
    """Faster ones that do not fit; if none fits, the smallest."""
    count: int
    """Layouts looked at."""


def supported(config: Config) -> Config:
    """`config` with a vocabulary, if it can be estimated.

    Raises:
        ValueError: it is not bf16 training with the fast kernels.
    """
    needed = {"training.precision": (config.training.precision, "bf16"), "run.kernels": (config.run.kernels, "auto")}
    for key, (value, right) in needed.items():
        if value not in (right, "triton"):
            raise ValueError(f"{key}={value}: only bf16 training with the fast kernels is estimated, set {key}={right}")
    changes = {} if config.model.vocab_size else {"model.vocab_size": ASSUMED_VOCABULARY}
    return _changed(config, changes | {"run.device": "cuda"})


def memory_of_run(config: Config, vocab_size: int, dp: int) -> float | None:
    """Bytes that torch allocates at the peak of the fullest rank; None for what is not estimated."""
    given = {"model.vocab_size": config.model.vocab_size or vocab_size, "parallel.dp": dp}
    try:
        known = supported(_changed(config, given))
    except ValueError:
        return None
    return in_torch(memory(known, Layout.of(known), model_layers(known), load_rates("h100")))


def estimate(config: Config, cluster: Cluster) -> Estimate:
    """Memory and time of `config` as it is, `parallel.dp` aside, which is what the GPUs leave over.

    Raises:
        ValueError: the layout does not fit that many GPUs.
    """
    dp = config.check_world_size(cluster.gpus)
    config = _changed(config, {"parallel.dp": dp})
    return _estimate(config, model_layers(config), cluster)


def _estimate(config: Config, layers: Layers, cluster: Cluster) -> Estimate:
    layout = Layout.of(config)
    needed = memory(config, layout, layers, cluster.rates)
    return Estimate(config, layout, needed, *step_time(config, layout, layers, cluster.rates, cluster.per_node))


def search(config: Config, fixed: Collection[str], cluster: Cluster, top: int) -> Plan:
    """The `top` fastest layouts that fit.

    Args:
        config: the run, as `supported` returns it.
        fixed: dotted keys that must stay as they are.
        cluster: where.
        top: how many.

    Raises:
        ValueError: no layout is possible; names the most frequent reasons.
    """
    if "parallel.dp" not in fixed:
        config = _changed(config, {"parallel.dp": None})
    try:
        configured: Estimate | str = estimate(config, cluster)
    except ValueError as error:
        configured = str(error)
    layers = model_layers(config)
    found = [_estimate(candidate, layers, cluster) for candidate in _candidates(config, fixed, cluster)]
    reasons: Counter[str] = Counter()
    best: list[Estimate] = []
    too_large: list[Estimate] = []
    for item in sorted(found, key=_rank):
        fits = item.gib <= cluster.memory_gib
        if not fits and len(too_large) == top:
            continue
        if violations := find_violations(item.config):
            reasons.update(violation.message for violation in violations)
            continue
        (best if fits else too_large).append(item)
        if len(best) == top:
            break
    if not best and not too_large:
        raise ValueError(_impossible(config, fixed, cluster, reasons))
    if not best:
        smallest = sorted(found, key=lambda item: item.gib)
        too_large = [item for item in smallest[: 10 * top] if not find_violations(item.config)][:top]
    return Plan(configured, best, too_large, len(found))


def _rank(item: Estimate) -> tuple[float, float]:
    """Speed; what is equally bound by launches, by the time of its kernels."""
    return round(math.log(item.seconds), 2), item.seconds - item.time["launches, host"]


def given_keys(overrides: Sequence[str]) -> set[str]:
    """Dotted keys that overrides set, those inside of mappings (`parallel={tp: 2}`) included."""
    keys = set()
    for override in overrides:
        key, _, value = override.partition("=")
        data = yaml12.load(value).data
        keys |= {f"{key.strip()}.{name}" for name in data} if isinstance(data, dict) else {key.strip()}
    return keys


def overrides(before: Config, after: Config) -> list[str]:
    """What to put on the command line to get from one configuration to the other."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, _, value in differences(after, before)
    ]


def _impossible(config: Config, fixed: Collection[str], cluster: Cluster, reasons: Counter[str]) -> str:
    why = [message for message, _ in reasons.most_common(3)]
    sizes = {name: getattr(config.parallel, name) or 1 for name in ("tp", "pp", "cp", "dp")}
    held = math.prod(size for name, size in sizes.items() if f"parallel.{name}" in fixed)
    if not why and cluster.gpus % held:
        why = [f"the sizes given need {held} of them or a multiple"]
    if not why:
        batch = f"training.global_batch_size={config.training.global_batch_size}"
        why = [f"with the keys given, {batch} does not divide over any number of replicas; use a multiple of --gpus"]
    return f"no layout for {cluster.gpus} GPUs is possible: {'; '.join(why)}"


def _candidates(config: Config, fixed: Collection[str], cluster: Cluster) -> Iterator[Config]:
    model, gpus = config.model, cluster.gpus
    powers = [1 << n for n in range(14)]

    def options(key: str, values: list[Any]) -> list[Any]:
        section, name = key.split(".")
        return [getattr(getattr(config, section), name)] if key in fixed else values

    heads, cp = (model.num_attention_heads, model.query_groups), config.parallel.cp
    tps = options(
        "parallel.tp", [n for n in powers if n <= min(gpus, cluster.per_node) and not any(h % n for h in heads)]
    )
    pps = options("parallel.pp", [n for n in range(1, min(gpus, model.num_layers) + 1) if model.num_layers % n == 0])
    vpps = options("parallel.vpp", [1, 2, 4])
    eps = options(
        "parallel.ep", [n for n in powers if model.moe and model.moe.num_experts % n == 0 and n <= gpus] or [1]
    )
    sizes = options("training.micro_batch_size", [1, 2, 4, 8, 16])
    recomputes = options("training.recompute", ["none", "full"] if model.moe else ["none", "up_projection", "full"])
    # Whether a CUDA graph is possible at all: of its obstacles the layout decides pipelines and recomputation.
    plain = {"parallel.pp": 1, "parallel.vpp": 1, "parallel.overlap_param_gather": False, "training.recompute": "none"}
    captured = _changed(config, {**plain, "run.cuda_graph": True})
    can_capture = not any("run.cuda_graph" in violation.keys for violation in find_violations(captured))
    for tp, pp, vpp, ep, size, recompute in product(tps, pps, vpps, eps, sizes, recomputes):
        dp, rest = divmod(gpus, tp * pp * cp)
        deals_chunks = vpp == 1 or (pp > 1 and model.num_layers % (pp * vpp) == 0)
        if (
            rest
            or dp not in options("parallel.dp", [dp])
            or dp == 0
            or not deals_chunks
            or config.training.global_batch_size % (size * dp)
        ):
            continue
        for etp in options("parallel.etp", [None, 1] if model.moe and tp > 1 else [None]):
            if tp * cp * dp % (ep * (etp or tp)) == 0:
                layout = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "dp": dp}
                changes = {f"parallel.{name}": value for name, value in layout.items()}
                changes |= {"training.micro_batch_size": size, "training.recompute": recompute}
                yield _completed(config, fixed, can_capture, changes)


def _completed(config: Config, fixed: Collection[str], can_capture: bool, changes: dict[str, Any]) -> Config:
    """`changes` and what follows from them, where the user has not said otherwise."""
    tp, dp = changes["parallel.tp"], changes["parallel.dp"]
    can_capture = can_capture and changes["parallel.pp"] == 1 and changes["training.recompute"] != "full"
    graph = config.run.cuda_graph if "run.cuda_graph" in fixed else can_capture
    in_codes = dp > 1 and config.parallel.ternary_param_gather
    follow = {
        "run.cuda_graph": graph,
        "parallel.sequence_parallel": tp > 1,
        "parallel.distributed_optimizer": dp > 1,
        "parallel.overlap_grad_reduce": dp > 1,
        "parallel.ternary_param_gather": in_codes,
        "parallel.overlap_param_gather": dp > 1 and not graph and not in_codes,
    }
    return _changed(config, changes | {key: value for key, value in follow.items() if key not in fixed})


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with dotted keys replaced, not validated."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
    )
