"""Tokens per CPU-second of `qsparse data prepare`, as CSV.

    python benchmarks/data_prepare.py --source 'corpus/*.jsonl.xz' --tokenizer tokenizer.json > rates.csv

Every row is one whole preparation in a process of its own: decompression, reading, spools, shuffle, encoding, shards,
and the start of Python.  CPU time is user and system time of the process and its workers (getrusage), because wall
time on a shared machine says little; variants are interleaved, `--repeats` times.
"""

import argparse
import csv
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import prepare

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "pack": {"pack_seq_length": 4096},
    "dedup exact": {"dedup": "exact"},
    "dedup near": {"dedup": "near"},
    "tokenizers": {},
}
COLUMNS = (
    "variant", "encoder", "workers", "documents", "tokens", "cpu_s", "wall_s", "mtokens_per_cpu_s",
)  # fmt: skip


def main() -> None:
    """Measure every variant and print a row each."""
    parser = argparse.ArgumentParser(description="Tokens per CPU-second of `qsparse data prepare`, as CSV.")
    parser.add_argument("--source", action="append", help="as of `qsparse data prepare`; may be repeated")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: train one, which counts)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    arguments = parser.parse_args()
    writer = csv.DictWriter(sys.stdout, COLUMNS)
    writer.writeheader()
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.repeats):
        for variant in arguments.variant or VARIANTS:
            ours, theirs = context.Pipe()
            process = context.Process(target=_measure, args=(variant, arguments, theirs))
            process.start()
            theirs.close()
            writer.writerow(ours.recv())
            sys.stdout.flush()
            process.join()


def _measure(variant: str, arguments: argparse.Namespace, pipe: Any) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {"output": Path(folder, "out"), "text_key": arguments.text_key, **VARIANTS[variant]}
        if arguments.source:
            values["sources"] = tuple(arguments.source)
        if arguments.tokenizer:
            values["tokenizer"] = arguments.tokenizer
        if variant == "tokenizers":
            values["tokenizer"] = _without_fast_path(arguments.tokenizer, Path(folder))
        manifest = prepare(PrepareOptions(**values), workers=arguments.workers, stream=io.StringIO()).manifest
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    records = [record for shards in manifest.splits.values() for record in shards]
    tokens = sum(record.tokens for record in records)
    pipe.send(
        {
            "variant": variant,
            "encoder": manifest.tokenizer.encoder,
            "workers": arguments.workers,
            "documents": sum(record.documents for record in records),
            "tokens": tokens,
            "cpu_s": round(cpu, 2),
            "wall_s": round(time.monotonic() - begin, 2),
            "mtokens_per_cpu_s": round(tokens / cpu / 1e6, 3),
        }
    )


def _without_fast_path(tokenizer: Path | None, folder: Path) -> Path:
    """A copy of the tokenizer with a normalizer, which tiktoken has not."""
    if tokenizer is None:
        raise SystemExit("the variant 'tokenizers' needs --tokenizer")
    spec = json.loads(tokenizer.read_text(encoding="utf-8"))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**spec, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
