"""What the preflight measures on each rank; a few seconds in all, and collective where it says so.

Speeds are medians of a few repetitions after a warm-up.  All-reduce rates are bytes of the buffer over time ("algorithm
bandwidth"), for 64 MiB on GPUs and 8 MiB over gloo.  Clock skew is Cristian's: the other clock is read in the middle of
the fastest of several round trips, so its error is at most half of that trip.
"""

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist

from pipeline.environment import PACKAGES, describe_environment
from pipeline.preflight_report import RankFacts

_REPETITIONS = 5
_DISK_BYTES = 32 * 2**20
_CLOCK_TRIPS = 8


def node_name() -> str:
    """Name of this node: SLURM's, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def measure(device: torch.device, folder: Path) -> RankFacts:
    """Everything about this rank; collective.

    Args:
        device: where this rank computes.
        folder: shared between the nodes.
    """
    nodes = _gather(node_name())
    matrix_rate = gemm_tflops(device)
    local_ranks = [rank for rank, node in enumerate(nodes) if node == node_name()]
    groups = _neighbour_groups(nodes)
    local, local_right = _node_all_reduce(nodes, device) if len(local_ranks) > 1 else (None, True)
    neighbours, pairs_right = _neighbour_all_reduces(groups, nodes, device)
    over_all, right = all_reduce_rate(None, device)
    disk_rate, disk_problem = check_folder(folder, nodes)
    free, total = _memory(device)
    return RankFacts(
        rank=dist.get_rank(),
        node=node_name(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        gpus=torch.cuda.device_count() if device.type == "cuda" else 0,
        memory_bytes=total,
        free_memory_bytes=free,
        gemm_tflops=matrix_rate,
        local_gigabytes_per_s=local,
        neighbours=neighbours,
        global_gigabytes_per_s=over_all,
        sums_right=right and local_right and pairs_right,
        clock_skew_s=clock_skew(device),
        disk_megabytes_per_s=disk_rate,
        disk_free_bytes=shutil.disk_usage(folder).free if folder.exists() else 0,
        disk_problem=disk_problem,
        versions={name: value for name, value in describe_environment().items() if name in (*PACKAGES, "python")},
    )


def gemm_tflops(device: torch.device) -> float:
    """Rate of a square matrix product, TFLOP/s."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator, dtype=torch.float32).to(dtype) for _ in "ab")
    return 2 * size**3 / _median_seconds(lambda: a @ b, device) / 1e12


def all_reduce_rate(group: dist.ProcessGroup | None, device: torch.device) -> tuple[float, bool]:
    """(GB/s, whether the sums are right) of an all-reduce over `group` (None: all ranks); collective in it."""
    count = (64 if device.type == "cuda" else 8) * 2**20 // 4
    value = torch.full((count,), float(dist.get_rank(group) + 1), device=device)
    dist.all_reduce(value, group=group)
    size = dist.get_world_size(group)
    right = bool((value == size * (size + 1) / 2).all())
    value.zero_()
    return 4 * count / _median_seconds(lambda: dist.all_reduce(value, group=group), device) / 1e9, right


def clock_skew(device: torch.device) -> float:
    """Seconds that this clock is ahead of rank 0's; collective."""
    skews = [0.0]
    for rank in range(1, dist.get_world_size()):
        if dist.get_rank() == 0:
            for _ in range(_CLOCK_TRIPS):
                dist.recv(torch.zeros(1, dtype=torch.float64, device=device), rank)
                dist.send(torch.tensor([time.time()], dtype=torch.float64, device=device), rank)
        elif dist.get_rank() == rank:
            skews = [skew for _, skew in sorted(_clock_trip(device) for _ in range(_CLOCK_TRIPS))]
    return skews[0]


def _clock_trip(device: torch.device) -> tuple[float, float]:
    answer = torch.zeros(1, dtype=torch.float64, device=device)
    start = time.time()
    dist.send(answer, 0)
    dist.recv(answer, 0)
    theirs, end = float(answer), time.time()
    return end - start, (start + end) / 2 - theirs


def check_folder(folder: Path, nodes: list[str]) -> tuple[float, str]:
    """(MB/s of writing, what is wrong) with the shared folder: writable, and the same on all nodes; collective."""
    token = _gather(uuid4().hex)[0]
    mine = folder / f".preflight-{token}-{dist.get_rank()}"
    rate, problem = 0.0, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rate = _write(mine)
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}"
    problems = _gather(problem)
    if not problem:
        missing = [
            nodes[rank]
            for rank, other in enumerate(problems)
            if not other and not _appears(folder / f".preflight-{token}-{rank}")
        ]
        if missing:
            problem = f"{folder} is not the same folder as on {', '.join(sorted(set(missing)))}"
    dist.barrier()
    with suppress(OSError):
        mine.unlink()
    return rate, problem


def _appears(path: Path) -> bool:
    """Whether a file is there; network file systems may take a moment to show it."""
    for _ in range(20):
        if path.exists():
            return True
        os.listdir(path.parent)
        time.sleep(0.1)
    return False


def _write(path: Path) -> float:
    data = os.urandom(2**20)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_DISK_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _DISK_BYTES / (time.perf_counter() - start) / 1e6


def _neighbour_groups(nodes: list[str]) -> list[tuple[int, int, dist.ProcessGroup]]:
    """(rank, rank, their group) for ranks of the same local number on neighbouring nodes of the ring; collective."""
    names = list(dict.fromkeys(nodes))
    ranks = {name: [rank for rank, node in enumerate(nodes) if node == name] for name in names}
    ring = (
        list(zip(names, [*names[1:], names[0]], strict=True)) if len(names) > 2 else [tuple(names)] * (len(names) - 1)
    )
    pairs = [pair for one, other in ring for pair in zip(ranks[one], ranks[other], strict=False)]
    return [(a, b, dist.new_group([a, b])) for a, b in pairs]


def _neighbour_all_reduces(
    groups: list[tuple[int, int, dist.ProcessGroup]], nodes: list[str], device: torch.device
) -> tuple[dict[str, float], bool]:
    rates: dict[str, float] = {}
    all_right = True
    for a, b, group in groups:
        if dist.get_rank() in (a, b):
            rate, right = all_reduce_rate(group, device)
            rates[nodes[b if dist.get_rank() == a else a]] = rate
            all_right &= right
    return rates, all_right


def _node_all_reduce(nodes: list[str], device: torch.device) -> tuple[float, bool]:
    result = (0.0, True)
    for name in dict.fromkeys(nodes):
        group = dist.new_group([rank for rank, node in enumerate(nodes) if node == name])
        if name == nodes[dist.get_rank()]:
            result = all_reduce_rate(group, device)
    return result


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for repetition in range(_REPETITIONS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repetition:
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def _memory(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _gather(text: str) -> list[str]:
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, text)
    return everyone
