"""`--dry-run`: estimates against the preparation itself, and nothing written."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.commands import main
from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import prepare
from pipeline.data.readers import read_documents
from pipeline.data.sources import list_inputs
from pipeline.data.statistics import dry_run, layout
from tests.data import reading

SEQ_LENGTH = 256


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred modules, three of them twice, in two files."""
    folder = tmp_path_factory.mktemp("dry") / "source"
    folder.mkdir()
    files = [file for file in list_inputs(["stdlib"]) if 200 < file.bytes < 20_000][:300]
    texts = [text for file in files for text in read_documents(file)]
    for number, part in enumerate((texts, ["", *texts[:3]])):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path) -> Path:
    """The dataset that the dry run is about."""
    prepare(options(source, source.parent / "out"), workers=1, stream=io.StringIO())
    return source.parent / "out"


def options(source: Path, output: Path, **more: Any) -> PrepareOptions:
    return PrepareOptions(output=output, sources=(str(source),), vocab_size=600, val_share=0.0, **more)


def test_estimates_agree_with_the_preparation(source: Path, prepared: Path) -> None:
    result = dry_run(options(source, source / "none"), seq_lengths=[SEQ_LENGTH], workers=1, stream=io.StringIO())
    documents = reading.read_documents(prepared, "train")
    lengths = np.array([document.size for document in documents])
    assert (result.num_files, result.documents_read, len(result.lengths)) == (2, len(documents), len(documents))
    assert result.omissions.without_text == 1
    # The sample is the whole corpus here; what is left is rounding and that documents differ in bytes per token.
    assert result.lengths.sum() == pytest.approx(lengths.sum(), rel=0.01)
    assert np.median(result.lengths) == pytest.approx(np.median(lengths), rel=0.1)
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // SEQ_LENGTH != (ends - 1) // SEQ_LENGTH
    (found,) = result.layouts
    assert found.cut == pytest.approx(cut.mean(), abs=0.03)
    assert found.packed_cut == pytest.approx((lengths > SEQ_LENGTH).mean(), abs=0.03)
    assert found.cut_fitting > 0.1


def test_duplicates_are_those_of_the_preparation(source: Path, tmp_path: Path) -> None:
    given = options(source, tmp_path / "out", dedup="near")
    result = dry_run(given, seq_lengths=[SEQ_LENGTH], workers=2, stream=io.StringIO())
    record = prepare(given, workers=1, stream=io.StringIO()).manifest.dedup
    assert record is not None
    assert (result.exact_duplicates, result.near_duplicates) == (record.exact_removed, record.near_removed)
    assert result.exact_duplicates >= 3


def test_layout_of_known_lengths() -> None:
    result = layout(np.array([6, 6, 4, 24]), 10)
    assert (result.cut, result.cut_fitting) == (0.5, pytest.approx(1 / 3))
    assert result.packed_cut == 0.25
    assert result.padding == 0.0, "6 + 4, and 24 + 6: remainders 4 and 6"


def test_command_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "--dry-run", "--source", str(source), "--vocab-size", "600", "--workers", "1"]
    assert main([*command, "--seq-length", "256", "--dedup", "exact", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for text in (
        "Dry run: nothing was written",
        "exact duplicates",
        "Document lengths",
        "256",
        "trained on the sample",
    ):
        assert text in shown
    assert list(tmp_path.iterdir()) == []
    assert main([*command[:1], *command[2:], "--seq-length", "256", "--output", str(tmp_path / "out")]) == 2
    assert "--seq-length 256: only for --dry-run; to pack, use --pack-seq-length" in capsys.readouterr().err
