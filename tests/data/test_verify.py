"""`verify` finds each kind of damage and names file, member and byte; sound data has no problems."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.loader import open_windows
from pipeline.data.manifest import DatasetManifest
from pipeline.data.shards import ShardIndex, index_path
from pipeline.data.verify import verify_dataset

Corpus = tuple[Path, DatasetManifest]
Damaged = Callable[[], Path]
SHARD = "train-00001.tar"


def problems(folder: Path, workers: int = 2) -> list[str]:
    return [str(problem) for problem in verify_dataset(folder, workers=workers, stream=io.StringIO())]


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_sound_dataset_and_its_progress(corpus: Corpus) -> None:
    stream = io.StringIO()
    assert verify_dataset(corpus[0], workers=1, stream=stream) == []
    assert "verify" in stream.getvalue()
    assert problems(corpus[0], workers=4) == []


def first_chunk(folder: Path) -> int:
    return int(ShardIndex.load(index_path(folder / SHARD)).chunks["offset"][0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SHARD).unlink(), "missing shard, dataset.json lists it with"),
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-20_000]), "truncated shard"),
        (lambda f: change(f / SHARD, first_chunk(f) + 99, b"\xff\xff"), "crc32 is"),
        (lambda f: change(f / SHARD, first_chunk(f) + 98, b"\xff\xff"), "token id 65535 is outside the vocabulary"),
        (lambda f: change(f / SHARD, 0, b"XXXX"), "not a readable tar"),
        (lambda f: change(f / SHARD, first_chunk(f) - 128, b"JUNK"), "not a readable .npy"),
        (lambda f: (f / "train-99999.tar").write_bytes(b""), "shard that dataset.json does not list"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "sha256 is"),
    ],
    ids=["missing", "truncated", "flipped", "token", "tar-header", "npy-header", "stranger", "tokenizer"],
)  # fmt: skip
def test_damage_is_named(damaged: Damaged, damage: Callable[[Path], object], message: str) -> None:
    folder = damaged()
    damage(folder)
    found = problems(folder)
    assert any(message in problem for problem in found), found
    assert len({problem.split(": ")[0] for problem in found}) == 1, "nothing else is blamed"


def test_a_bad_header_does_not_hurt_training(corpus: Corpus, damaged: Damaged) -> None:
    """Readers go by the index: a header that foreign tools trip over leaves the tokens as they are."""
    folder = damaged()
    change(folder / SHARD, 0, b"XXXX")
    change(folder / SHARD, first_chunk(folder) - 128, b"JUNK")
    found = open_windows(folder, "train", seq_length=64).windows(range(2000))
    assert np.array_equal(found, open_windows(corpus[0], "train", seq_length=64).windows(range(2000)))


def test_counts_against_dataset_json(damaged: Damaged) -> None:
    folder = damaged()
    raw = json.loads((folder / "dataset.json").read_text())
    raw["splits"]["train"][1]["tokens"] += 1
    (folder / "dataset.json").write_text(json.dumps(raw))
    assert any(
        "index mismatch, it describes another shard than dataset.json" in problem for problem in problems(folder)
    )
