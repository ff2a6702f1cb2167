"""`qsparse bench data-scale`: what reading costs a job of any size, calculated from the order and the formats.

Nothing is measured here but the order itself, which is opened at full size: N chunks of the given tokens, the rest is
arithmetic.  "obvious" is a random permutation of windows read from shards, with every rank opening every index.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.bench.options import amount, bench_parser, count
from pipeline.data.order import LANE_DEPTH, ChunkInterleave, LayoutChange
from pipeline.data.shards import CHUNK_DTYPE

_CHUNKS_PER_SHARD = 256
_CRC_BYTES_PER_SECOND = 1.9e9


@dataclass(frozen=True)
class Job:
    """A training job and its corpus."""

    tokens: float
    gpus: int
    gpus_per_replica: int
    gpus_per_node: int
    seq_length: int
    global_batch_size: int
    tokens_per_second: float
    """Of the whole job."""
    chunk_tokens: int
    bytes_per_token: int

    @property
    def readers(self) -> int:
        """Ranks that read: the first and the last stage of every replica, if that has several GPUs."""
        return self.gpus // self.gpus_per_replica * (2 if self.gpus_per_replica > self.gpus_per_node else 1)

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.gpus // self.gpus_per_replica

    @property
    def chunks(self) -> int:
        """Chunks of the corpus."""
        return round(self.tokens / self.chunk_tokens)


def rows(job: Job) -> list[tuple[str, str, str]]:
    """(quantity, ours, obvious) of the table."""
    per_reader = job.tokens_per_second / job.replicas
    chunk_bytes = job.chunk_tokens * job.bytes_per_token
    shards = -(-job.chunks // _CHUNKS_PER_SHARD)
    window_bytes = (job.seq_length + 1) * job.bytes_per_token
    windows = job.tokens / job.seq_length
    chunks_per_second = per_reader / job.chunk_tokens
    lanes = job.global_batch_size * LANE_DEPTH
    index = job.chunks * CHUNK_DTYPE.itemsize
    order = job.chunks * 4 + job.chunks / 16 * 8
    opened, seconds = _simulate(job)
    return [
        ("opens at the start, whole job", f"{2 * job.gpus + 2 * shards:,}", f"{2 * shards * job.gpus:,}"),
        ("requests per reader and second", f"{chunks_per_second:.3f}", f"{per_reader / job.seq_length:.2f}"),
        (
            "requests of the job per second",
            f"{chunks_per_second * job.readers:,.0f}",
            f"{per_reader / job.seq_length * job.readers:,.0f}",
        ),
        ("bytes per request", f"{chunk_bytes / 1e6:.1f} MB", f"{window_bytes / 1e3:.1f} kB"),
        ("MB/s per reader", f"{per_reader * job.bytes_per_token / 1e6:.3f}", "the same"),
        ("GB/s of the job", f"{per_reader * job.bytes_per_token * job.readers / 1e9:.2f}", "the same"),
        ("CPU share of one core for crc32", f"{per_reader * job.bytes_per_token / _CRC_BYTES_PER_SECOND:.4%}", "none"),
        ("chunks open per reader", f"{lanes / job.replicas:.0f}", "any"),
        ("cache per reader", f"{lanes / job.replicas * chunk_bytes / 1e6:.0f} MB", "the corpus"),
        ("index, mapped once per node", f"{index / 1e6:.0f} MB", f"{windows * 12 / 1e9:.0f} GB"),
        ("order, per reader", f"{order / 1e6:.0f} MB", f"{windows * 8 / 1e9:.0f} GB"),
        ("opening the order (measured)", f"{opened:.1f} s", "minutes to hours"),
        ("one step of the job (measured)", f"{seconds * 1e3:.1f} ms CPU", ""),
    ]


def _simulate(job: Job) -> tuple[float, float]:
    """CPU seconds to open the order, and to locate all samples of a step."""
    windows = np.full(job.chunks, job.chunk_tokens // job.seq_length, dtype=np.int32)
    start = time.process_time()
    order = ChunkInterleave(windows, (0,), [LayoutChange(0, job.global_batch_size)])
    order.locate(np.zeros(1, dtype=np.int64))
    opened = time.process_time() - start
    start, steps = time.process_time(), 20
    for step in range(1000, 1000 + steps):
        order.locate(np.int64(step) * job.global_batch_size + np.arange(job.global_batch_size))
    return opened, (time.process_time() - start) / steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = bench_parser("data-scale", "Opens, requests, bytes and memory of reading at any scale.")
    add = parser.add_argument
    add("--tokens", type=amount, default=15e12, help="tokens of the corpus (default: 15e12)")
    add("--gpus", type=count, default=8192, help="GPUs of the job (default: 8192)")
    add("--gpus-per-replica", type=count, default=8, help="tp * pp * cp (default: 8)")
    add("--gpus-per-node", type=count, default=8, help="GPUs of a node (default: 8)")
    add("--seq-length", type=count, default=4096, help="tokens per sequence (default: 4096)")
    add("--global-batch-size", type=count, default=4096, help="sequences per step (default: 4096)")
    add("--tokens-per-second", type=amount, default=72e6, help="of the job (default: 72e6, 8 B parameters at 42%% MFU)")
    add("--chunk-tokens", type=count, default=2**20, help="tokens per chunk (default: 1048576)")
    add("--bytes-per-token", type=int, choices=(2, 4), default=4, help="2 up to 65,536 ids (default: 4)")
    add("--markdown", action="store_true", help="print the table as it stands in docs/data.md")
    options = vars(parser.parse_args(arguments))
    markdown = options.pop("markdown")
    job = Job(**options)
    if job.gpus % job.gpus_per_replica:
        parser.error(f"--gpus {job.gpus} is not a multiple of --gpus-per-replica {job.gpus_per_replica}")
    header = (f"{job.gpus:,} GPUs, {job.tokens / 1e12:g} T tokens", "here", "obvious")
    if markdown:
        for cells in (header, ("---",) * 3, *rows(job)):
            print(f"| {' | '.join(cells)} |")
        return 0
    table = Table(*header)
    for row in rows(job):
        table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
