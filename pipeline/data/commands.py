"""`qsparse data prepare | info | verify | export`: command lines of the data side.

Also runs on its own: `python -m pipeline.data.commands prepare --output data/stdlib`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from pipeline.data.errors import DataError
from pipeline.data.export import export_megatron
from pipeline.data.info import print_info
from pipeline.data.loader import SourceFiles
from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import PrepareResult, default_workers, prepare
from pipeline.data.remote import RemoteOptions
from pipeline.data.statistics import dry_run, print_dry_run
from pipeline.data.verify import verify_dataset

Command = Callable[[argparse.Namespace], int]


# argparse does not export the type of what add_subparsers returns.
def add_data_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data` with its commands; each sets `run`, a callable from the arguments to an exit code."""
    parser = subparsers.add_parser("data", help="prepare, inspect and check token datasets")
    _add_commands(parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a data command.

    Returns:
        Exit code: 0 done, 1 problems found, 2 wrong use or bad data.
    """
    parser = argparse.ArgumentParser(prog="qsparse data", description="Prepare, inspect and check token datasets.")
    _add_commands(parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True))
    parsed = parser.parse_args(arguments)
    run: Command = parsed.run
    return run(parsed)


def _add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _add_prepare(commands)
    info = commands.add_parser("info", help="show splits, document lengths and cut documents")
    _add_dataset(info)
    info.add_argument(
        "--seq-length", type=int, action="append", metavar="N",
        help="sequence length to count cut documents for; may be repeated (default: 256 2048 4096)",
    )  # fmt: skip
    info.set_defaults(run=_guarded(_run_info))
    verify = commands.add_parser("verify", help="check every shard against dataset.json")
    _add_dataset(verify)
    verify.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="threads (default: cores)")
    verify.set_defaults(run=_guarded(_run_verify))
    export = commands.add_parser("export", help="write a dataset as Megatron's .bin and .idx")
    export.add_argument("dataset", type=Path, metavar="DIR", help="dataset folder")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for SPLIT.bin and SPLIT.idx")
    export.add_argument("--overwrite", action="store_true", help="replace files of these names")
    export.set_defaults(run=_guarded(_run_export))


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="dataset folder or address, such as s3://bucket/folder")
    parser.add_argument("--cache", type=Path, default=RemoteOptions().cache, metavar="DIR",
        help="where what is fetched from an address lies meanwhile (default: %(default)s)")  # fmt: skip


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "prepare",
        help="tokenize text into shards",
        description="Tokenize text into WebDataset shards. Interrupted, the same command goes on where it stopped.",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the dataset")
    add("--source", dest="sources", action="append", metavar="SOURCE",
        help="stdlib (source of Python's standard library, the default), a file, a folder or a quoted glob pattern of "
             ".txt .md .rst .py .jsonl .json .parquet .tar (also .gz .xz .bz2 .zst), or a Megatron .idx; "
             "may be repeated")  # fmt: skip
    add("--text-key", metavar="NAME", help="JSON field or parquet column with the text (default: text)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to use (default: train one on the corpus)")
    add("--vocab-size", type=int, metavar="N", help="ids of the trained tokenizer (default: 4096)")
    add("--tokenizer-megabytes", type=float, metavar="MB", help="text the tokenizer is trained on (default: 32)")
    add("--eod-token", metavar="TOKEN", help="token that ends every document (default: <|endoftext|>)")
    add("--val-share", type=float, metavar="X", help="share of documents held out for validation (default: 0.02)")
    add("--seed", type=int, metavar="N", help="seed of the document shuffle (default: 0)")
    add("--chunk-tokens", type=int, metavar="N", help="tokens per chunk (default: 1048576, less for small corpora)")
    add("--shard-tokens", type=int, metavar="N", help="tokens per shard (default: 268435456, less for small corpora)")
    add("--max-megabytes", type=float, metavar="MB", help="use about this much text (default: all)")
    add("--license", metavar="NAME", help="licence of the text, recorded in dataset.json")
    add("--dedup", choices=["none", "exact", "near"], help="remove documents that repeat an earlier one, or nearly do "
        "(MinHash of 5-word shingles; default: none)")  # fmt: skip
    add("--near-threshold", type=float, metavar="X", help="similarity of near-duplicates, 0.5 to 1 (default: 0.8)")
    add("--pack-seq-length", type=int, metavar="N",
        help="order documents by best-fit packing, so that windows of this seq_length cut as few as possible "
             "(default: documents follow one another)")  # fmt: skip
    add("--dry-run", action="store_true", help="read everything and show statistics; write nothing")
    add("--seq-length", type=int, action="append", metavar="N",
        help="with --dry-run: sequence length to count cut documents for; may be repeated (default: 2048 4096 8192)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; the result does not depend on it (default: cores, up to 8)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset in DIR, from scratch")
    parser.set_defaults(run=_guarded(_run_prepare))


def _guarded(run: Command) -> Command:
    """Turn bad data, a full disk or a missing permission into one line and exit code 2."""

    def guarded(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except (DataError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return 130

    return guarded


def _run_prepare(arguments: argparse.Namespace) -> int:
    if arguments.workers is not None and arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers}: needs at least 1")
    options = _options(arguments)
    if arguments.dry_run:
        return _run_dry(options, arguments)
    if arguments.seq_length:
        raise DataError(f"--seq-length {arguments.seq_length[0]}: only for --dry-run; to pack, use --pack-seq-length")
    result = prepare(options, workers=arguments.workers, overwrite=arguments.overwrite)
    manifest = result.manifest
    sums = [
        f"{split} {sum(record.tokens for record in records):,} tokens in {len(records)} shards"
        for split, records in manifest.splits.items()
    ]
    print(f"{options.output}: {result.status}; {', '.join(sums)}; tokenizer {manifest.tokenizer.name}")
    for line in _notes(result):
        print(line)
    return 0


def _run_dry(options: PrepareOptions, arguments: argparse.Namespace) -> int:
    seq_lengths = _seq_lengths(arguments, [2048, 4096, 8192])
    workers = arguments.workers or default_workers()
    result = dry_run(options, seq_lengths=seq_lengths, workers=workers, stream=sys.stderr)
    print_dry_run(result, options, workers=workers, console=Console())
    return 0


def _seq_lengths(arguments: argparse.Namespace, default: list[int]) -> list[int]:
    chosen: list[int] = arguments.seq_length or default
    if min(chosen) < 1:
        raise DataError(f"--seq-length {min(chosen)}: needs at least 1")
    return chosen


def _run_export(arguments: argparse.Namespace) -> int:
    for part in export_megatron(arguments.dataset, arguments.output, overwrite=arguments.overwrite):
        print(f"{part.prefix}.bin, .idx: {part.documents:,} documents, {part.tokens:,} tokens")
    return 0


def _notes(result: PrepareResult) -> Iterator[str]:
    manifest = result.manifest
    if result.note:
        yield f"encoded with {manifest.tokenizer.encoder}: {result.note}"
    if "val" not in manifest.splits:
        yield "no val split, which training evaluates on: prepare more documents, or a larger --val-share"
    if omissions := result.omissions.describe():
        yield omissions
    if manifest.dedup is not None:
        near = f", {manifest.dedup.near_removed:,} near-duplicates" if manifest.dedup.method == "near" else ""
        yield (
            f"removed {manifest.dedup.exact_removed:,} exact duplicates{near} "
            f"of {manifest.dedup.documents_read:,} documents"
        )
    if manifest.packing is not None and result.status == "prepared":
        total = sum(record.tokens for records in manifest.splits.values() for record in records)
        share = f"; padding {result.padding / total:.2%} of the tokens" if not result.shards_kept else ""
        yield f"packed for seq_length {manifest.packing.seq_length:,}{share}"


def _options(arguments: argparse.Namespace) -> PrepareOptions:
    given = {name: getattr(arguments, name) for name in PrepareOptions.model_fields}
    try:
        return PrepareOptions.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise DataError(f"{flag} {first['input']}: {first['msg']}") from None


def _run_info(arguments: argparse.Namespace) -> int:
    seq_lengths = _seq_lengths(arguments, [256, 2048, 4096])
    files = SourceFiles(arguments.dataset, RemoteOptions(cache=arguments.cache))
    print_info(files, seq_lengths=seq_lengths, console=Console())
    return 0


def _run_verify(arguments: argparse.Namespace) -> int:
    remote = RemoteOptions(cache=arguments.cache)
    problems = verify_dataset(arguments.dataset, workers=max(arguments.workers, 1), remote=remote)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{arguments.dataset}: no problems")
        return 0
    print(
        f"{len(problems)} problems; delete the named shards and run the prepare command in dataset.json again: "
        "it makes only what is missing",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
