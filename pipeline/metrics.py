"""metrics.jsonl: one JSON object per record, the source of truth for every number a run logs.

    {"step": 120, "time_ms": 1767225600123, "train/loss": 5.31, "train/grad_norm": 0.82, ...}

`step` is the number of optimizer steps done, `time_ms` the Unix time in milliseconds.  Values that are not finite
are the strings "nan", "inf" and "-inf", so that each line is strict JSON and any tool reads it.

A tracking server may be slow, down or gone; a file beside the checkpoints is none of these.  So the file is
written first, line by line, and MLflow is a copy that can be completed at any time (`pipeline.track_sync.replay`).
The price is that a resume has to keep the file honest: records of steps that will be trained again are cut off
(`rewind`), and the half line that a kill leaves behind is dropped.  On a full disk records wait in memory.
"""

import errno
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.run_directory import write_atomic

logger = logging.getLogger(__name__)

RESERVED = ("step", "time_ms")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class MetricInfo:
    """What a metric name stands for; `<layer>` in a name is a module path such as `decoder.layers.0.mlp.linear_fc1`."""

    name: str
    unit: str
    meaning: str


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("train/loss", "nat/token", "cross-entropy of the step's batch, averaged over its tokens"),
    MetricInfo("train/grad_norm", "1", "global L2 norm of the gradient before clipping"),
    MetricInfo("train/lr", "1", "learning rate of the step"),
    MetricInfo("train/weight_decay", "1", "decoupled weight decay of the step"),
    MetricInfo("train/tokens", "token", "tokens trained on since step 0: the token axis"),
    MetricInfo("val/loss", "nat/token", "cross-entropy of the held-out sequences"),
    MetricInfo("val/perplexity", "1", "exp(val/loss)"),
    MetricInfo("perf/step_seconds", "s", "wall time of an optimizer step, mean since the last record"),
    MetricInfo("perf/tokens_per_second", "token/s", "tokens trained on per second, over all ranks"),
    MetricInfo("perf/data_wait_seconds", "s", "part of step_seconds spent waiting for the loader"),
    MetricInfo("data/bad_chunks", "chunk", "chunks of the dataset that could not be read and are gone around"),
    MetricInfo("perf/mfu_dense_bf16", "1", "FLOP/s of the dense model over the device's bf16 peak, in [0, 1]"),
    MetricInfo("mem/peak_bytes", "byte", "largest peak of device memory over the ranks (resident memory on a CPU)"),
    MetricInfo("qsparse/sparsity", "1", "share of zero linear-layer inputs, weighted by projection weights"),
    MetricInfo("qsparse/ternary_zeros", "1", "share of zeros among the ternary weights"),
    MetricInfo("qsparse/activated_parameters", "parameter", "parameters a token multiplies: N (1 - sparsity)"),
    MetricInfo("moe/imbalance", "1", "tokens of the busiest expert over its layer's mean, averaged over MoE layers"),
    MetricInfo("moe/max_imbalance", "1", "the same for the layer where it is largest"),
    MetricInfo("moe/dropped_share", "1", "share of token copies that experts dropped for lack of capacity"),
    MetricInfo("moe/router_entropy", "nat", "entropy of the router's softmax over experts, averaged over tokens"),
    MetricInfo("moe/router_z_loss", "1", "squared log-sum-exp of the router's logits, averaged over tokens"),
    MetricInfo("layer_expert_tokens/<layer>", "token", "token copies of the step that this expert multiplied"),
    MetricInfo("layer_sparsity/<layer>", "1", "share of zeros in this layer's input"),
    MetricInfo("layer_ternary_zeros/<layer>", "1", "share of zeros among this layer's ternary weights"),
    MetricInfo("system/cpu_utilization_percentage", "%", "load of all CPU cores of rank 0's machine, mean since then"),
    MetricInfo("system/system_memory_usage_megabytes", "MB", "memory in use on that machine"),
    MetricInfo("system/system_memory_usage_percentage", "%", "the same as a share"),
    MetricInfo("system/disk_usage_percentage", "%", "the file system of the run directory"),
    MetricInfo("system/network_receive_megabytes", "MB", "received since the last record"),
    MetricInfo("system/network_transmit_megabytes", "MB", "sent since the last record"),
    MetricInfo("system/gpu_<n>_utilization_percentage", "%", "time in which a kernel ran, by NVIDIA's driver"),
    MetricInfo("system/gpu_<n>_memory_usage_megabytes", "MB", "memory in use on the GPU"),
    MetricInfo("system/gpu_<n>_power_usage_watts", "W", "power draw of the GPU"),
)


def metric_info(name: str) -> MetricInfo:
    """The table row of a metric.

    Raises:
        ValueError: The name is not in the table (the message lists the names that are).
    """
    prefix, _, _ = name.partition("/")
    canonical = f"{prefix}/<layer>" if prefix.startswith("layer_") else re.sub(r"/gpu_\d+_", "/gpu_<n>_", name)
    for info in METRICS:
        if info.name == canonical:
            return info
    raise ValueError(f"metric {name!r} is unknown; known: {', '.join(info.name for info in METRICS)}")


def layer_metric(layer: str, quantity: str) -> str:
    """Name of a per-layer metric; `quantity` is `sparsity` or `ternary_zeros`.

    The quantity comes first: MLflow makes a section of what is before the last slash, so each quantity is one section
    with a chart per layer.
    """
    return f"layer_{quantity}/{layer}"


class MetricsLog:
    """Append-only writer of metrics.jsonl; one per run, on rank 0.

    Args:
        path: The file; made if absent.  A torn last line of a killed run is cut off first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _ends_complete(path):
            _rewrite(path, read_metrics(path))
        self._waiting = b""
        # Unbuffered: a kill -9 loses no complete record, because each has reached the kernel.
        self._file = path.open("ab", buffering=0)

    def write(self, metrics: Mapping[str, float], step: int) -> int:
        """Append one record.

        Args:
            metrics: Name to value, plain numbers in the table's units.
            step: Optimizer steps done.

        Returns:
            The record's time in Unix milliseconds; hand it to `Tracker.log`, so that the file and MLflow carry the
            same time and a repeated delivery is recognized as such.

        Raises:
            ValueError: A metric is called `step` or `time_ms`.
        """
        for name in RESERVED:
            if name in metrics:
                raise ValueError(f"metric name {name!r} is taken by the record itself")
        time_ms = time.time_ns() // 1_000_000
        is_first = not self._waiting
        self._waiting += _encode({"step": step, "time_ms": time_ms, **metrics}).encode() + b"\n"
        self._flush()
        if self._waiting and is_first:
            logger.warning("%s: no space left; records wait in memory and are written when there is", self._path)
        return time_ms

    def _flush(self) -> None:
        try:
            while self._waiting:
                # A part of a record may fit: what is left of it goes on where it ended.
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in _FULL:
                raise

    def rewind(self, step: int) -> int:
        """Drop the records of steps after `step`, which a run that resumes there trains again.

        Returns:
            The number of records dropped.
        """
        self.close()
        records = read_metrics(self._path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) < len(records):
            _rewrite(self._path, kept)
        self._file = self._path.open("ab", buffering=0)
        return len(records) - len(kept)

    def close(self) -> None:
        """Close the file; closing twice is fine.  Records for which there is still no space are given up."""
        if self._file.closed:
            return
        self._flush()
        if self._waiting:
            logger.error("%s: no space left; its last %d bytes are lost", self._path, len(self._waiting))
            self._waiting = b""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records in the order written, non-finite values as floats; a torn last line is left out.

    Raises:
        ValueError: A line other than the last is not a record (file and line are named).
        FileNotFoundError: No such file.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return list(_decode_lines(path, lines))


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, from the records that have it."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def _decode_lines(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError(f"step is {record['step']!r}")
            yield {key: value if key in RESERVED else float(value) for key, value in record.items()}
        except (ValueError, TypeError, KeyError) as error:
            # split("\n") ends with what follows the last newline: "" if the file is whole, else the torn record.
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number}: not a metrics record: {line[:80]!r} ({error})") from None


def _ends_complete(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(_encode(record) + "\n" for record in records))


def _encode(record: Mapping[str, Any]) -> str:
    strict = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(strict, allow_nan=False)
