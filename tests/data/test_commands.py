"""`qsparse data`: exit codes, messages, `verify` and `info` against an independent reader."""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.data.commands import add_data_parser, main
from pipeline.data.info import document_statistics, print_info
from pipeline.data.loader import SourceFiles
from pipeline.data.manifest import DatasetManifest
from pipeline.data.shards import ShardIndex, index_path
from pipeline.data.verify import verify_dataset
from tests.data import reading

Corpus = tuple[Path, DatasetManifest]
Damaged = Callable[[], Path]


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in verify_dataset(folder, workers=2, stream=io.StringIO())]


def test_sound_dataset_verifies(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(corpus[0])]) == 0
    assert f"{corpus[0]}: no problems" in capsys.readouterr().out


def test_verify_lists_everything_that_is_wrong(damaged: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged()
    shard = folder / "train-00000.tar"
    offset = int(ShardIndex.load(index_path(shard)).chunks["offset"][0])
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xff")
    (folder / "train-00001.tar").unlink()
    (folder / "train-00099.tar").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    found = "\n".join(problems(folder))
    assert "train-00000.tar: sha256 is " in found
    assert f"train-00000.tar: member 00000-00000.tokens.npy at byte {offset}: crc32 is " in found
    assert "token id 65535 is outside the vocabulary of 600" in found
    assert "train-00001.tar: missing shard, dataset.json lists it with" in found
    assert "train-00099.tar: shard that dataset.json does not list" in found
    assert "tokenizer.json: sha256 is " in found
    assert main(["verify", str(folder)]) == 1
    assert "delete the named shards and run the prepare command" in capsys.readouterr().err


def test_verify_walks_the_tar_itself(damaged: Damaged) -> None:
    folder = damaged()
    shard = folder / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[0:5] = b"99999"
    shard.write_bytes(data)
    assert any("not a readable tar" in problem or "expected 00000-00000" in problem for problem in problems(folder))


def test_document_statistics_equal_an_independent_count(corpus: Corpus) -> None:
    statistics = document_statistics(SourceFiles(corpus[0]), "train")
    lengths = [len(document) for document in reading.read_documents(corpus[0], "train")]
    assert statistics.lengths.tolist() == lengths
    assert statistics.continued.any(), "the corpus has documents longer than a chunk"
    cut = []
    for tokens, doclens in reading.read_chunks(corpus[0], "train"):
        ends = np.cumsum(doclens).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            closed = tokens[end - 1] == corpus[1].eod_id
            last_input = max(start, min(end - 1, len(tokens) - 2))  # the last token of a chunk is a label only
            cut.append((start // 512 != last_input // 512 or not closed, closed))
    # Pieces to documents: a document is cut if one of its pieces is.
    merged, carried = [], False
    for is_cut, closed in cut:
        carried |= is_cut
        if closed:
            merged.append(carried)
            carried = False
    assert statistics.cut(512).tolist() == merged


def test_info_shows_counts(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(corpus[0]), "--seq-length", "512"]) == 0
    assert "Document lengths" in capsys.readouterr().out
    text = io.StringIO()
    print_info(SourceFiles(corpus[0]), seq_lengths=[512], console=Console(file=text, width=120))
    records = corpus[1].splits["train"]
    assert f"{sum(record.tokens for record in records):,}" in text.getvalue()
    assert f"{document_statistics(SourceFiles(corpus[0]), 'train').cut(512).mean():.1%}" in text.getvalue()


def test_prepare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps({"t": f"document number {i} " * 20}) + "\n" for i in range(50))
    (tmp_path / "s.jsonl").write_text(lines)
    command = ["prepare", "--source", str(tmp_path / "s.jsonl"), "--text-key", "t", "--vocab-size", "300"]
    command += ["--val-share", "0.1", "--license", "CC0-1.0", "--workers", "1", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert "prepared; train " in capsys.readouterr().out
    assert main(command) == 0
    assert "up to date" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["license"] == "CC0-1.0"
    assert manifest["command"] == (
        f"qsparse data prepare --source {tmp_path}/s.jsonl --license CC0-1.0 --text-key t --val-share 0.1 "
        "--vocab-size 300 --output DIR"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["verify", "nowhere"],
            "error: nowhere: no dataset.json; make one with `qsparse data prepare --output nowhere`",
        ),
        (["info", "nowhere"], "error: nowhere: no dataset.json"),
        (["prepare", "--output", "x", "--val-share", "1.5"], "error: --val-share 1.5: Input should be less than 1"),
        (["prepare", "--output", "x", "--vocab-size", "0"], "error: --vocab-size 0: Input should be greater than 0"),
        (["prepare", "--output", "x", "--workers", "0"], "error: --workers 0: needs at least 1"),
        (["prepare", "--output", "x", "--tokenizer", "t.json"], "error: --tokenizer t.json: no such file"),
        (["prepare", "--output", __file__], f"error: --output {__file__}: is a file, expected a folder"),
        (["prepare", "--output", "x", "--source", "y.txt"], "error: source y.txt: no such file or folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parser_fits_into_a_larger_command() -> None:
    parser = argparse.ArgumentParser(prog="qsparse")
    add_data_parser(parser.add_subparsers())
    arguments = parser.parse_args(["data", "verify", "nowhere"])
    assert arguments.run(arguments) == 2
