"""Where text comes from: files and folders turned into a sorted list of inputs, which `readers.py` reads.

    stdlib                        source of this Python's standard library, about 11 MB without its tests (PSF licence)
    FILE | FOLDER | 'GLOB'        .txt .md .rst .py     one document per file
                                  .jsonl .json          one document per line, the string under --text-key
                                  .parquet              one document per row, the column --text-key
                                  .tar .tgz             one document per WebDataset sample
                                  .idx                  Megatron's indexed dataset, tokens in the .bin beside it
    all but .idx also with .gz .xz .bz2 .zst behind

Files of a folder are ordered by a hash of their relative name, not by name: the order is the same everywhere, and a
`--max-megabytes` cap then takes an even sample of the tree rather than the letters a to c.  `Path.rglob` is not used
on a user's folder, because it passes over what it may not read without a word.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.data.compression import COMPRESSIONS
from pipeline.data.errors import DataError

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
Kind = Literal["text", "jsonl", "parquet", "tar", "megatron"]
_COMPRESSIBLE: dict[str, Kind] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys(JSON_SUFFIXES, "jsonl"),
    ".parquet": "parquet",
    ".tar": "tar",
}
_SUPPORTED = f"{' '.join(_COMPRESSIBLE)} (also with {' '.join(COMPRESSIONS)}) .tgz .idx"
# Tests are partly not valid text on purpose and missing on Debian; encodings are character tables.
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class InputFile:
    """One file that holds documents."""

    path: Path
    kind: Kind
    compression: str
    """Suffix of the compression, or empty."""
    bytes: int
    mtime_ns: int


def list_inputs(specs: Sequence[str]) -> list[InputFile]:
    """Files behind the sources, each once, in a fixed order.

    Args:
        specs: `stdlib`, files, folders or glob patterns.

    Raises:
        DataError: A source does not exist, cannot be listed, holds nothing readable, has an unknown suffix, or tokens
            (.idx) are mixed with text.
    """
    if not specs:
        raise DataError("no source given; use --source stdlib, a file, a folder or a quoted glob pattern")
    files = {file.path: file for spec in specs for file in _list_one(spec)}
    tokens = [file for file in files.values() if file.kind == "megatron"]
    if 0 < len(tokens) < len(files):
        text = next(file for file in files.values() if file.kind != "megatron")
        raise DataError(
            f"sources mix tokens ({tokens[0].path}) and text ({text.path}); prepare them as two datasets, "
            "or name the files with a glob pattern"
        )
    return list(files.values())


def file_kind(path: Path) -> tuple[Kind, str] | None:
    """What a file holds by its name, and its compression; None for other files."""
    suffix, compression = path.suffix, ""
    if suffix in (".tgz", ".idx"):
        return ("tar", ".gz") if suffix == ".tgz" else ("megatron", "")
    if suffix in COMPRESSIONS:
        suffix, compression = Path(path.stem).suffix, suffix
    kind = _COMPRESSIBLE.get(suffix)
    return None if kind is None else (kind, compression)


def _list_one(spec: str) -> list[InputFile]:
    if spec == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not _STDLIB_SKIPPED & set(path.relative_to(root).parts)]
        return [_describe(path) for path in _hash_order(root, paths)]
    path = Path(spec)
    if path.is_dir():
        found = _list_folder(path)
        if not found:
            raise DataError(f"source {spec}: the folder holds no file with a suffix of {_SUPPORTED}")
        return found
    if path.exists():
        return [_describe(path)]
    matches = [Path(match) for match in sorted(glob.glob(spec, recursive=True))]
    if not matches:
        raise DataError(f"source {spec}: no such file or folder, and as a glob pattern it matches nothing")
    return [file for match in matches for file in (_list_folder(match) if match.is_dir() else [_describe(match)])]


def _list_folder(root: Path) -> list[InputFile]:
    found = [path for path in _walk(root) if file_kind(path) is not None]
    return [_describe(path) for path in _hash_order(root, found)]


def _walk(root: Path) -> Iterator[Path]:
    """Files that are not hidden, in folders that are not hidden; linked folders too, each once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_cannot_list, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(folder, name) for name in names if not name.startswith("."))
        seen.add(real)


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"source {error.filename}: cannot be listed: {error.strerror}")


def _hash_order(root: Path, paths: Sequence[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: hashlib.blake2b(path.relative_to(root).as_posix().encode()).digest())


def _describe(path: Path) -> InputFile:
    kind = file_kind(path)
    if kind is None:
        raise DataError(f"source {path}: unknown suffix; supported: {_SUPPORTED}")
    data = path.with_suffix(".bin") if kind[0] == "megatron" else path
    try:
        status = data.stat()
    except OSError as error:
        reason = f"a link to {path.readlink()}, which does not exist" if path.is_symlink() else error.strerror
        raise DataError(f"source {data}: {reason}") from None
    # A linked .idx keeps its place, since its .bin is looked for beside it.
    place = path.absolute() if kind[0] == "megatron" else path.resolve()
    return InputFile(place, kind[0], kind[1], status.st_size, status.st_mtime_ns)
