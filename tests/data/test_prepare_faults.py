"""Faults while a dataset is made: full disks, kills at any moment, broken inputs.  Nothing gets lost or short."""

import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.errors import DataError
from pipeline.data.options import PrepareOptions
from pipeline.data.prepare import PrepareResult, prepare
from pipeline.data.tokenizer import load_tokenizer
from tests.data import reading

KILLS = int(os.environ.get("QSPARSE_KILLS", "6"))
OPTIONS = ["--vocab-size", 300, "--shard-tokens", 30_000, "--dedup", "near", "--pack-seq-length", 64]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline.data.commands", "prepare", *map(str, arguments)]


def run(output: Path, *sources: Path, **options: Any) -> PrepareResult:
    values = {"vocab_size": 300, "val_share": 0.0, **options}
    return prepare(
        PrepareOptions(output=output, sources=tuple(map(str, sources)), **values), workers=1, stream=io.StringIO()
    )


def write_lines(path: Path, texts: list[str], opener: Callable[..., Any] = open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def texts_of(folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(ids.tolist()) for ids in reading.read_documents(folder, "train")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 MB of text in four files, with a few duplicates."""
    folder = tmp_path_factory.mktemp("faults") / "corpus"
    folder.mkdir()
    numbers = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    for part in range(4):
        texts = [" ".join(numbers.choices(words, k=numbers.randrange(5, 400))) for _ in range(250)]
        write_lines(folder / f"{part}.jsonl.gz", [*texts, texts[0]], gzip.open)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the dataset of `OPTIONS` from a preparation that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    subprocess.run(command("--source", corpus, *OPTIONS, "--output", out), check=True, capture_output=True)
    return reading.files_of(out)


def test_kill_9_at_random_moments(corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Killed again and again, a preparation ends with the bytes of one that was left alone.

    Six times here, QSPARSE_KILLS=50 makes it fifty.
    """
    options = ["--source", corpus, *OPTIONS, "--workers", 2]
    begin = time.monotonic()
    subprocess.run(command(*options, "--output", tmp_path / "timed"), check=True, capture_output=True)
    duration = time.monotonic() - begin
    moments = random.Random(1)
    kills = finished = 0
    while kills < KILLS or not finished:
        out = tmp_path / f"killed-{finished}"
        process = subprocess.Popen(
            command(*options, "--output", out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        wait_for(lambda out=out, process=process: (out / ".prepare" / "request").exists() or process.poll() is not None)
        try:
            # Early kills are more frequent: they leave more to do, and the next run begins where this one was.
            _, errors = process.communicate(timeout=moments.random() ** 2 * duration if kills < KILLS else 120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors.decode()
        assert reading.files_of(out) == undisturbed
        assert sorted(path.name for path in out.iterdir()) == sorted(undisturbed), "no leftovers"
        finished += 1
    print(f"{kills} kills, {finished} finished datasets, {duration:.1f} s for one that is left alone")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size, or changes its size; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
        )
        if result.returncode:
            pytest.skip(f"cannot mount a small file system: {result.stderr.strip()}")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


# Full while the text is read, and while shards are written.
@pytest.mark.parametrize(
    ("size", "workers", "shards_begun"), [("600k", 2, False), ("1600k", 1, True), ("1800k", 2, True)]
)
def test_full_disk(
    corpus: Path,
    undisturbed: dict[str, bytes],
    small_disk: Callable[[str], Path],
    size: str,
    workers: int,
    shards_begun: bool,
) -> None:
    out = small_disk(size) / "out"
    options = ["--source", corpus, *OPTIONS, "--workers", workers, "--output", out]
    failed = subprocess.run(command(*options), capture_output=True, text=True)
    assert failed.returncode == 2
    assert f"error: {out}: No space left on device; make room" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (out / "dataset.json").exists()
    assert bool(list(out.glob("*.tar"))) == shards_begun
    small_disk("64m")
    subprocess.run(command(*options), check=True, capture_output=True)
    assert reading.files_of(out) == undisturbed


def test_file_size_limit(corpus: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    options = ["--source", corpus, "--vocab-size", 300, "--workers", 1, "--output", tmp_path / "out"]
    failed = subprocess.run(command(*options), capture_output=True, text=True, preexec_fn=limit)
    assert failed.returncode == 2
    assert f"error: {tmp_path}/out: File too large; make room" in failed.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
    assert not list((tmp_path / "out" / ".prepare").glob("*.bin")), "no half-written file under its final name"
    subprocess.run(command(*options), check=True, capture_output=True)


def as_nobody(call: Callable[[], Any]) -> str:
    """Message of the error of `call` in a process without root's rights, empty if there is none."""

    def child(pipe: Any) -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        try:
            call()
            pipe.send("")
        except (DataError, OSError) as error:
            pipe.send(str(error))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    process.join()
    assert ours.poll(), "the process died"
    message: str = ours.recv()
    return message


def test_unreadable_file_and_folder() -> None:
    """In a folder of its own: pytest's is closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "in" / "secret").mkdir(parents=True)
        file = write_lines(folder / "in" / "a.jsonl", ["one"])
        file.chmod(0)
        message = as_nobody(lambda: run(folder / "out", folder / "in"))
        assert message == f"[Errno 13] Permission denied: '{file}'"
        file.chmod(0o644)
        (folder / "in" / "secret").chmod(0)
        message = as_nobody(lambda: run(folder / "out2", folder / "in"))
        assert message == f"source {folder}/in/secret: cannot be listed: Permission denied"
        (folder / "in" / "secret").chmod(0o755)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def failure(tmp_path: Path, *sources: Path) -> str:
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", *sources)
    assert not (tmp_path / "out" / "dataset.json").exists()
    return str(caught.value)


def test_truncated_gzip_names_file_and_line_and_can_be_repaired(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", ["a good file"])
    bad = write_lines(tmp_path / "b.jsonl.gz", [f"{number} " * 300 for number in range(300)], gzip.open)
    whole = bad.read_bytes()
    truncate(bad, 0.7)
    message = failure(tmp_path, good, bad)
    line = int(message.removeprefix(f"{bad}:").split(":")[0])
    assert 100 < line < 300
    assert "damaged compressed file: Compressed file ended before the end-of-stream marker" in message
    bad.write_bytes(whole)
    run(tmp_path / "out", good, bad)
    assert len(texts_of(tmp_path / "out")) == 301


def test_broken_line_in_a_large_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(5000)])
    lines = path.read_text().splitlines(keepends=True)
    lines[3210] = lines[3210][:15] + "\n"
    path.write_text("".join(lines))
    assert failure(tmp_path, path).startswith(f"{path}:3211: expected one JSON object per line: ")


def test_truncated_and_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"text {number} " * 50 for number in range(4000)]})
    pq.write_table(table, path, row_group_size=500, write_page_checksum=True, use_dictionary=False)
    whole = path.read_bytes()
    truncate(path, 0.6)
    assert failure(tmp_path, path).startswith(f"{path}: not a readable parquet file: ")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    message = failure(tmp_path, path)
    assert message.startswith(f"{path}: after row ")
    assert "not a readable parquet file" in message


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_damaged_tars_are_never_taken_for_short_ones(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number:04d}.txt": b"some text" * 100 for number in range(50)})
    whole = path.read_bytes()
    path.write_bytes(whole[: 20 * 1536])
    assert failure(tmp_path, path) == (
        f"{path}: damaged or truncated tar at byte {20 * 1536}: the file ends without an end-of-archive block"
    )
    path.write_bytes(whole[: 20 * 1536 + 700])
    assert failure(tmp_path, path).startswith(f"{path}: damaged or truncated tar")
    damaged = bytearray(whole)
    damaged[30 * 1536 + 5] ^= 1
    path.write_bytes(damaged)
    assert f"{path}: damaged or truncated tar at byte {30 * 1536}: bad checksum" in failure(tmp_path, path)
    path.write_bytes(gzip.compress(whole)[:-200])
    path = path.rename(tmp_path / "a.tar.gz")
    assert failure(tmp_path, path).startswith(f"{path}: ")


def test_empty_inputs_are_counted(tmp_path: Path) -> None:
    empty = write_lines(tmp_path / "a.jsonl", [])
    assert failure(tmp_path, empty) == "the sources hold no document with text"
    lines = write_lines(tmp_path / "b.jsonl", ["text", "", " \n\t", "more"])
    (tmp_path / "c.txt").write_text("")
    result = run(tmp_path / "out", empty, lines, tmp_path / "c.txt")
    assert sorted(texts_of(tmp_path / "out")) == ["more", "text"]
    assert result.omissions.describe() == "left out 3 documents without text; 1 files hold no document"


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b"}' + "\n" + r'{"text": "pair \ud83d\ude00"}' + "\n")
    result = run(tmp_path / "out", path)
    assert sorted(texts_of(tmp_path / "out")) == ["a\ufffdb", "pair \U0001f600"]
    assert result.omissions.describe() == "replaced lone surrogates by U+FFFD in 1 documents"


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    assert failure(tmp_path, path).startswith(
        f"{path}:2: expected one JSON object per line: 'utf-8' codec can't decode"
    )


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "a.jsonl", ["x"])
    (tmp_path / "in" / "b.jsonl").symlink_to("nowhere")
    message = failure(tmp_path, tmp_path / "in")
    assert message == f"source {tmp_path}/in/b.jsonl: a link to nowhere, which does not exist"
