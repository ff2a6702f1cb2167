"""Every format of source gives the documents that were written, and every mistake names its place."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data.errors import DataError
from pipeline.data.sources import InputFile, list_inputs, read_documents

TEXTS = ["first\ndocument\n", "", "zweites Dokument: äöü", "第三 \U0001f600\n"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
}


def read_all(*specs: object, text_key: str = "text") -> list[str]:
    inputs = list_inputs([str(spec) for spec in specs])
    return [text for file in inputs for text in read_documents(file, text_key=text_key)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"data{suffix}{compression}"
    lines = "\n\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS))
    path.write_bytes(COMPRESS[compression](lines.encode()))
    assert read_all(path, text_key="body") == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_text_files_are_one_document_each(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](b"\xef\xbb\xbfeins\r\nzw\xc3\xb6lf\r\n"))
    assert read_all(path) == ["eins\nzwölf\n"]


def test_python_files_honour_their_coding_cookie(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe4'\n")
    assert read_all(path)[0].endswith("x = 'ä'\n")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"n": range(5), "content": [*TEXTS, None]}), path, row_group_size=2)
    assert read_all(path, text_key="content") == [*TEXTS, ""]


def test_zstd_with_several_frames_and_large_text(tmp_path: Path) -> None:
    text = "".join(f"{i} " for i in range(400_000))
    half = len(text) // 2
    path = tmp_path / "big.txt.zst"
    path.write_bytes(zstandard.compress(text[:half].encode()) + zstandard.compress(text[half:].encode()))
    assert read_all(path) == [text]


def test_folder_and_glob_in_a_fixed_order(tmp_path: Path) -> None:
    for i in range(30):
        target = tmp_path / f"d{i % 3}" / f"{i}.txt"
        target.parent.mkdir(exist_ok=True)
        target.write_text(str(i))
    (tmp_path / "image.png").write_bytes(b"no text")
    (tmp_path / ".hidden.txt").write_text("no")
    folder = read_all(tmp_path)
    assert sorted(map(int, folder)) == list(range(30))
    assert folder == read_all(tmp_path)
    assert folder != [str(i) for i in range(30)]
    assert read_all(f"{tmp_path}/d1/*.txt") == sorted(str(i) for i in range(1, 30, 3))
    assert read_all(tmp_path, tmp_path / "d0") == folder, "a file given twice counts once"


def test_standard_library() -> None:
    inputs = list_inputs(["stdlib"])
    names = {file.path.name for file in inputs}
    assert {"argparse.py", "tarfile.py", "typing.py"} <= names
    assert not any({"test", "site-packages"} & set(file.path.parts[-3:-1]) for file in inputs)
    assert sum(file.bytes for file in inputs) > 5e6


def mistake(*specs: object, text_key: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read_all(*specs, text_key=text_key)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "expected one JSON object per line"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"body": "x", "id": 1}', r"no field 'text' \(fields: body, id\); name the field with --text-key"),
        ('{"text": 7}', "field 'text' is int, expected a string"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    assert re.match(f"{re.escape(str(path))}:3: {message}", mistake(path))


def test_other_mistakes(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\nthr\xffe")
    assert "bad.txt:3: byte 11 is not valid utf-8; convert the file to UTF-8" in mistake(tmp_path / "bad.txt")
    (tmp_path / "a.pdf").write_bytes(b"")
    assert "a.pdf: unknown suffix; supported: .txt .md" in mistake(tmp_path / "a.pdf")
    assert "no such file or folder, and as a glob pattern it matches nothing" in mistake(tmp_path / "missing.txt")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no file with a suffix of" in mistake(tmp_path / "empty")
    assert "no source given" in mistake()
    pq.write_table(pa.table({"n": [1], "t": ["x"]}), tmp_path / "p.parquet")
    assert "p.parquet: no column 'text' (columns: n, t); name it with --text-key" in mistake(tmp_path / "p.parquet")
    assert "p.parquet: row 1: column 'n' is int" in mistake(tmp_path / "p.parquet", text_key="n")
    (tmp_path / "q.parquet").write_bytes(b"no parquet")
    assert "q.parquet: not a readable parquet file" in mistake(tmp_path / "q.parquet")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_truncated_compressed_file(tmp_path: Path, compression: str, suffix: str) -> None:
    lines = "".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(2000)).encode()
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](lines)[:-40])
    assert re.search(rf"data{suffix}{compression}(:\d+)?: damaged compressed file", mistake(path))


def test_inputs_are_plain_records(tmp_path: Path) -> None:
    (tmp_path / "x.md.gz").write_bytes(gzip.compress(b"text"))
    (file,) = list_inputs([str(tmp_path)])
    status = (tmp_path / "x.md.gz").stat()
    assert file == InputFile((tmp_path / "x.md.gz").resolve(), "text", ".gz", status.st_size, status.st_mtime_ns)
