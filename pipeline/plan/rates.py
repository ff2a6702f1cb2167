"""Rates of a GPU and its links from `rates.yaml`, where each number has its date and source."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline import yaml12

RATES_FILE = Path(__file__).with_name("rates.yaml")
_BASE = "h100"


class Rates(BaseModel):
    """See `rates.yaml`; operations/s, bytes/s, seconds, GiB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_gib: float
    bandwidth: float
    gemm_bf16: float
    gemm_int8: float
    gemm_e4m3: float
    grouped_8bit: float
    grouped_8bit_wgrad: float
    grouped_bf16: float
    grouped_bf16_wgrad: float
    attention_forward: float
    attention_backward: float
    sparsify_slowdown: float
    step_overhead: float
    host_dense_layer: float
    host_quantized_layer: float
    host_moe_layer: float
    context_gib: float
    nccl_gib: float
    fragmentation: float
    nvlink: float
    network: float
    latency_node: float
    latency_network: float


def read_rates() -> dict[str, dict[str, tuple[float, str, str]]]:
    """(value, date, source) of every number, by GPU and name."""
    document = yaml12.load(RATES_FILE.read_text(encoding="utf-8")).data
    given: dict[str, Any] = {
        gpu: {name: (*map(str, row),) for name, row in rows.items()} for gpu, rows in document.items()
    }
    merged = {gpu: given[_BASE] | rows for gpu, rows in given.items()}
    return {gpu: {name: (float(v), date, why) for name, (v, date, why) in rows.items()} for gpu, rows in merged.items()}


def load_rates(gpu: str) -> Rates:
    """The rates of `gpu`.

    Raises:
        ValueError: there are none; names those that there are.
    """
    known = read_rates()
    if gpu not in known:
        raise ValueError(f"--gpu {gpu}: there are rates for {', '.join(known)} (pipeline/plan/rates.yaml)")
    return Rates.model_validate({name: value for name, (value, _, _) in known[gpu].items()})
