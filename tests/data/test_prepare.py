"""Preparation: contents, determinism, restart after a kill, and what it refuses."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.manifest import DatasetManifest
from pipeline.data.options import PrepareOptions
from pipeline.data.output import locked
from pipeline.data.parallel import Counts, run_tasks
from pipeline.data.prepare import PrepareResult, prepare
from pipeline.data.progress import StageProgress
from pipeline.data.readers import read_documents
from pipeline.data.sources import list_inputs
from pipeline.data.tokenizer import load_tokenizer
from tests.data import reading

SMALL: dict[str, Any] = {"vocab_size": 300, "chunk_tokens": 2048, "shard_tokens": 8192, "val_share": 0.2}


def run(output: Path, *, workers: int = 1, overwrite: bool = False, **options: Any) -> PrepareResult:
    return prepare(
        PrepareOptions(output=output, **{**SMALL, **options}),
        workers=workers,
        overwrite=overwrite,
        stream=io.StringIO(),
    )


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Real documents, with a copy and empty ones, in tmp_path/source.jsonl."""
    files = [file for file in list_inputs(["stdlib"]) if 500 < file.bytes < 8000][:40]
    documents = [text for file in files for text in read_documents(file)]
    lines = [*documents, documents[0], "", "  \n"]
    (tmp_path / "source.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return [*documents, documents[0]]


def source(tmp_path: Path) -> tuple[str, ...]:
    return (str(tmp_path / "source.jsonl"),)


def test_every_document_is_there_once(texts: list[str], tmp_path: Path) -> None:
    manifest = run(tmp_path / "out", sources=source(tmp_path)).manifest
    tokenizer = load_tokenizer(tmp_path / "out")
    decoded = {
        split: [tokenizer.decode(ids.tolist()) for ids in reading.read_documents(tmp_path / "out", split)]
        for split in ("train", "val")
    }
    assert sorted(decoded["train"] + decoded["val"]) == sorted(texts)
    assert not set(decoded["train"]) & set(decoded["val"]), "copies stay on one side"
    assert decoded["train"] != [text for text in texts if text in set(decoded["train"])], "shuffled"
    for split, records in manifest.splits.items():
        assert sum(record.documents for record in records) == len(decoded[split])
        assert sum(record.tokens for record in records) == sum(
            len(ids) for ids in reading.read_documents(tmp_path / "out", split)
        )
    assert len(manifest.splits["train"]) > 2


def test_split_is_by_hash_of_the_text_and_not_by_seed(texts: list[str], tmp_path: Path) -> None:
    def val_texts(name: str, seed: int) -> list[str]:
        run(tmp_path / name, sources=source(tmp_path), seed=seed)
        tokenizer = load_tokenizer(tmp_path / name)
        return [tokenizer.decode(ids.tolist()) for ids in reading.read_documents(tmp_path / name, "val")]

    first, second = val_texts("a", 0), val_texts("b", 1)
    hashes = {text: hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts}
    expected = {text for text, digest in hashes.items() if int.from_bytes(digest, "little") < 0.2 * 2**64}
    assert set(first) == set(second) == expected
    assert first != second


def test_long_documents_are_cut_between_chunks(tmp_path: Path) -> None:
    text = "\n".join(f"line {i} of a long document" for i in range(3000))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "short.txt").write_text("short")
    run(tmp_path / "out", sources=(str(tmp_path),), chunk_tokens=1000, val_share=0.0, vocab_size=280)
    chunks = reading.read_chunks(tmp_path / "out", "train")
    assert len(chunks) > 5
    assert all(tokens.size < 2000 for tokens, _ in chunks)
    tokenizer = load_tokenizer(tmp_path / "out")
    documents = [tokenizer.decode(ids.tolist()) for ids in reading.read_documents(tmp_path / "out", "train")]
    assert sorted(documents) == sorted([text, "short"])
    assert not (tmp_path / "out" / "val-00000.tar").exists()


def test_result_does_not_depend_on_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_megabytes": 0.5, "shard_tokens": 30_000}
    results = [run(tmp_path / str(workers), workers=workers, **options).manifest for workers in (1, 2, 3)]
    assert len(results[0].splits["train"]) >= 3
    first = reading.files_of(tmp_path / "1")
    assert "dataset.json" in first
    assert reading.files_of(tmp_path / "2") == first
    assert reading.files_of(tmp_path / "3") == first


def test_cap_takes_a_prefix_of_the_inputs(texts: list[str], tmp_path: Path) -> None:
    cap = sum(len(text.encode()) for text in texts[:10]) - 1
    run(tmp_path / "out", sources=source(tmp_path), max_megabytes=cap / 1e6)
    tokenizer = load_tokenizer(tmp_path / "out")
    found = [
        tokenizer.decode(ids.tolist())
        for split in ("train", "val")
        for ids in reading.read_documents(tmp_path / "out", split)
    ]
    assert sorted(found) == sorted(texts[:10])


def test_given_tokenizer_and_wide_vocabulary(texts: list[str], tmp_path: Path) -> None:
    run(tmp_path / "small", sources=source(tmp_path))
    spec = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    spec["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    options = {**SMALL, "output": tmp_path / "out", "tokenizer": tmp_path / "mine.json", "sources": source(tmp_path)}
    with pytest.raises(DataError, match="--vocab-size is for a tokenizer trained here"):
        prepare(PrepareOptions(**options), stream=io.StringIO())
    del options["vocab_size"]
    manifest = prepare(PrepareOptions(**options), workers=1, stream=io.StringIO()).manifest
    assert (manifest.vocab_size, manifest.dtype, manifest.tokenizer.name) == (70_001, "uint32", "mine")
    small, wide = (reading.read_documents(tmp_path / name, "train") for name in ("small", "out"))
    assert wide[0].dtype == np.uint32
    assert all(np.array_equal(a, b) for a, b in zip(small, wide, strict=True))


def test_same_request_again_is_up_to_date(texts: list[str], tmp_path: Path) -> None:
    manifest = run(tmp_path / "out", sources=source(tmp_path)).manifest
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run(tmp_path / "out", sources=source(tmp_path))
    assert (again.status, again.manifest) == ("up to date", manifest)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_missing_and_truncated_shards_are_made_again(texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, sources=source(tmp_path))
    expected = reading.files_of(out)
    kept = (out / "train-00000.tar").stat().st_mtime_ns
    (out / "train-00001.tar").unlink()
    (out / "val-00000.tar").write_bytes(b"short")
    (out / "tokenizer.json").write_text("{}")
    result = run(out, sources=source(tmp_path))
    assert result.status == "prepared"
    assert result.shards_kept == len(expected) // 2 - 1 - 2
    assert reading.files_of(out) == expected
    assert (out / "train-00000.tar").stat().st_mtime_ns == kept


def test_other_contents_are_refused_and_overwritten_only_on_demand(texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, sources=source(tmp_path))
    with pytest.raises(DataError, match=r"holds another dataset, made by `qsparse data prepare .*pass --overwrite"):
        run(out, sources=source(tmp_path), seed=5)
    (out / "notes.txt").write_text("mine")
    manifest = run(out, sources=source(tmp_path), seed=5, shard_tokens=20_000, overwrite=True).manifest
    assert manifest.seed == 5
    names = {record.name for records in manifest.splits.values() for record in records}
    assert {path.name for path in out.glob("*.tar")} == names, "shards of the old dataset are gone"
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    with pytest.raises(DataError, match=r"not empty and holds no dataset \(there is thesis\.doc\)"):
        run(tmp_path / "full", sources=source(tmp_path))


def test_failed_start_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / "source.jsonl").write_text('{"body": "some text"}\n{"body": "more text"}\n')
    with pytest.raises(DataError, match=r"source\.jsonl:1: no field 'text'"):
        run(tmp_path / "out", sources=source(tmp_path))
    result = run(tmp_path / "out", sources=source(tmp_path), text_key="body")
    assert sum(record.documents for records in result.manifest.splits.values() for record in records) == 2


def test_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "source.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="the sources hold no document with text"):
        run(tmp_path / "out", sources=source(tmp_path))


def test_two_preparations_in_one_folder(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(DataError, match="another process is preparing a dataset here"):
        run(tmp_path / "out", sources=source(tmp_path))


def wait_for(condition: Any, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_kill_9_and_restart(tmp_path: Path) -> None:
    """A killed preparation leaves no process behind, and goes on without making finished shards again."""
    arguments = ["--max-megabytes", "2", "--vocab-size", "300", "--shard-tokens", "20000", "--workers", "2"]
    command = [sys.executable, "-m", "pipeline.data.commands", "prepare", *arguments, "--output"]
    out = tmp_path / "out"
    process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("train-*.idx.npz"))) >= 3)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "dataset.json").exists(), "the kill came too late to test anything"
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))
    finished = {
        path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.with_suffix(".tar.idx.npz").exists()
    }
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=True)
    assert f"keeping {len(finished)} of" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def die(task: int, report: Any) -> int:
    report(Counts(documents=1))
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail(task: int, report: Any) -> int:
    raise DataError(f"task {task} is wrong")


def test_killed_worker_and_failing_task_are_reported() -> None:
    with pytest.raises(DataError, match=r"died with exit code -9 \(-9: killed, often for memory\)"):
        list(run_tasks(die, [0, 1, 2, 3], workers=2, report=lambda counts: None))
    with pytest.raises(DataError, match=r"task [01] is wrong"):
        list(run_tasks(fail, [0, 1], workers=2, report=lambda counts: None))


def test_progress_is_json_lines_without_a_terminal(texts: list[str], tmp_path: Path) -> None:
    stream = io.StringIO()
    manifest: DatasetManifest = prepare(
        PrepareOptions(output=tmp_path / "out", sources=source(tmp_path), **SMALL), workers=1, stream=stream
    ).manifest
    lines = [json.loads(line) for line in stream.getvalue().splitlines() if line.startswith("{")]
    assert [line["stage"] for line in lines] == ["read", "encode"]
    assert lines[0]["documents"] == lines[1]["documents"] == len(texts)
    records = [record for records in manifest.splits.values() for record in records]
    assert lines[1]["tokens"] == sum(record.tokens for record in records)
    assert lines[1]["bytes"] == lines[1]["total_bytes"]


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(texts: list[str], tmp_path: Path) -> None:
    stream = Terminal()
    options = PrepareOptions(output=tmp_path / "out", sources=source(tmp_path), **SMALL)
    prepare(options, workers=1, stream=stream)
    shown = stream.getvalue()
    assert re.search(r"read .*100%.* documents/s", shown)
    assert re.search(r"encode .*100%.* documents/s +[\d,]+ tokens/s", shown)
    assert "{" not in shown


def test_eta_counts_compressed_bytes_of_the_inputs() -> None:
    stream = io.StringIO()
    with StageProgress("read", total_bytes=1000, measure="input_bytes", stream=stream, interval=0) as progress:
        time.sleep(0.05)
        progress.update(Counts(documents=5, bytes=9000, input_bytes=250))
    line = json.loads(stream.getvalue().splitlines()[0])
    assert line["eta_s"] == pytest.approx(3 * line["seconds"], abs=0.2)
    assert (line["documents"], line["input_bytes"], line["total_bytes"]) == (5, 250, 1000)


def test_a_tokenizer_that_cannot_be_used_is_named_before_the_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("no JSON")
    sources, tokenizer = (str(tmp_path / "a.jsonl"),), tmp_path / "bad.json"
    with pytest.raises(DataError, match=r"bad\.json: not a Hugging Face tokenizer\.json"):
        prepare(PrepareOptions(output=tmp_path / "out", sources=sources, tokenizer=tokenizer), stream=io.StringIO())
