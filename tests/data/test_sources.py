"""Every format of source gives the documents that were written, and every mistake names its place."""

import bz2
import gzip
import io
import json
import lzma
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data.errors import DataError
from pipeline.data.readers import DocumentReader, read_documents
from pipeline.data.sources import InputFile, list_inputs

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


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_compressed_parquet(tmp_path: Path, compression: str) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "data.parquet")
    path = tmp_path / f"data.parquet{compression}"
    path.write_bytes(COMPRESS[compression]((tmp_path / "data.parquet").read_bytes()))
    assert read_all(path) == TEXTS


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    compression = path.suffix if path.suffix != ".tar" else ""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(COMPRESS[".gz" if compression == ".tgz" else compression](data.getvalue()))
    return path


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst"])
def test_tar_of_samples(tmp_path: Path, suffix: str) -> None:
    path = write_tar(
        tmp_path / f"data{suffix}",
        {
            "a/0.json": b'{"title": "metadata, without a field text"}',
            "a/0.txt": "\ufefferstes\r\nDokument".encode(),
            "a/1.cls": b"7",
            "a/1.json": b'{\n  "text": "several lines of JSON"\n}',
            "a/2.jsonl": b'{"text": "line 1"}\n\n{"text": "line 2"}\n',
            "a/3.md.gz": gzip.compress(b"# compressed member"),
            "a/4.jsonl.zst": zstandard.compress(b'{"text": "line 3"}\n'),
            "a/.hidden.txt": b"no",
            "b/0.txt": b"last",
        },
    )
    assert read_all(path) == [
        "erstes\nDokument", "several lines of JSON", "line 1", "line 2", "# compressed member", "line 3", "last",
    ]  # fmt: skip


def test_tar_written_by_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "data.tar")) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": f"{number:06d}", "txt": text, "json": {"id": number}})
    assert read_all(tmp_path / "data.tar") == TEXTS


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.json": b'{"body": "x"}'}, "member 0.json: no field 'text' (fields: body)"),
        ({"0.jsonl": b'{"text": "x"}\n{'}, "member 0.jsonl:2: expected one JSON object per line"),
        ({"0.txt": b"a\nb\xff"}, "member 0.txt:2: byte 3 is not valid utf-8"),
        ({"0.txt.gz": gzip.compress(b"x" * 99)[:-9]}, "member 0.txt.gz: damaged compressed file"),
        ({"0.npy": b"x", "0.cls": b"1"}, "no member is .txt .md .rst .py .json .jsonl; it holds .cls .npy"),
    ],
)
def test_mistakes_in_tars_name_the_member(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = write_tar(tmp_path / "data.tar", members)
    assert mistake(path).startswith(f"{path}: {message}")


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


def test_glob_that_matches_folders_and_links_to_folders(tmp_path: Path) -> None:
    for name in ("2023-a", "2024-a", "2024-b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "x.txt").write_text(name)
    assert sorted(read_all(f"{tmp_path}/data/2024-*")) == ["2024-a", "2024-b"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "to").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert sorted(read_all(tmp_path / "linked")) == ["2023-a", "2024-a", "2024-b"]


def test_bytes_read_follow_the_compressed_file(tmp_path: Path) -> None:
    numbers = random.Random(0)
    lines = "".join(json.dumps({"text": str(numbers.random())}) + "\n" for _ in range(200_000))
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    (file,) = list_inputs([str(path)])
    reader = DocumentReader(file)
    seen = [reader.bytes_read for number, _ in enumerate(reader) if number % 1000 == 999]
    assert seen[-1] == file.bytes
    assert 0 < seen[0] < file.bytes


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
