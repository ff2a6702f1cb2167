"""The output folder of a preparation: what may be written there, what is there already, and by whom.

A folder belongs to one request.  `DIR/.prepare/request` says which while the preparation runs, `dataset.json`
afterwards.  Nothing that `prepare` did not write is ever removed, not even with --overwrite.
"""

import fcntl
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.errors import DataError
from pipeline.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, WORK_FOLDER, DatasetManifest, load_manifest
from pipeline.data.shards import atomic_write, file_sha256, index_path

_REQUEST_NAME = "request"
_OWNED = re.compile(r"\.?(dataset\.json|tokenizer\.json|(train|val)-\d{5,}\.tar(\.idx\.npz)?)(\.\d+\.tmp)?")


def up_to_date(folder: Path, request: str) -> DatasetManifest | None:
    """The finished dataset of this request, if all its files are there in full size."""
    manifest = _manifest_or_none(folder)
    if manifest is None or manifest.request != request or not _tokenizer_intact(folder, manifest):
        return None
    records = [record for shards in manifest.splits.values() for record in shards]
    intact = all(_has_size(folder / record.name, record.bytes) for record in records)
    return manifest if intact and all(index_path(folder / record.name).is_file() for record in records) else None


def refuse_other_contents(folder: Path, request: str, overwrite: bool) -> None:
    """Raise a DataError if the folder holds something else than this request, finished or not."""
    if overwrite:
        return
    manifest, begun = _manifest_or_none(folder), _request_begun(folder)
    if manifest is not None and manifest.request != request:
        raise DataError(
            f"{folder}: holds another dataset, made by `{manifest.command}` (or its input files have changed since); "
            "choose another --output, or pass --overwrite to replace it"
        )
    if manifest is None and begun not in (None, request) and any(folder.glob("*.tar")):
        raise DataError(
            f"{folder}: holds an unfinished preparation with other options or inputs; "
            "repeat its command to finish it, choose another --output, or pass --overwrite to start anew"
        )
    others = [path.name for path in folder.iterdir() if path.name != WORK_FOLDER]
    if manifest is None and begun is None and others:
        shown = ", ".join(sorted(others)[:3])
        raise DataError(f"{folder}: not empty and holds no dataset (there is {shown}); choose an empty --output")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process dies."""
    work = folder / WORK_FOLDER
    work.mkdir(exist_ok=True)
    with (work / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing a dataset here; wait for it or end it") from None
        yield


def start_work(folder: Path, request: str, overwrite: bool) -> None:
    """Clear what a new start must not find, and sign the folder.  The folder is locked."""
    work = folder / WORK_FOLDER
    ours = [path for path in folder.iterdir() if _OWNED.fullmatch(path.name)]
    is_new = _request_begun(folder) != request
    if is_new:
        _remove(path for path in work.iterdir() if path.name != "lock")
    if overwrite or (is_new and not (folder / MANIFEST_NAME).is_file()):
        _remove(ours)
    _remove(path for path in [*ours, *work.iterdir()] if path.suffix == ".tmp")
    manifest = _manifest_or_none(folder)
    if manifest is not None and not _tokenizer_intact(folder, manifest):
        (folder / TOKENIZER_NAME).unlink(missing_ok=True)
    with atomic_write(work / _REQUEST_NAME) as file:
        file.write(request.encode())


def finish_work(folder: Path) -> None:
    """Remove everything but the dataset."""
    shutil.rmtree(folder / WORK_FOLDER)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


def _request_begun(folder: Path) -> str | None:
    path = folder / WORK_FOLDER / _REQUEST_NAME
    return path.read_text() if path.is_file() else None


def _manifest_or_none(folder: Path) -> DatasetManifest | None:
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        return load_manifest(folder)
    except DataError as error:
        raise DataError(f"{error}; or delete the folder to start anew") from None


def _tokenizer_intact(folder: Path, manifest: DatasetManifest) -> bool:
    path = folder / manifest.tokenizer.file
    return path.is_file() and file_sha256(path) == manifest.tokenizer.sha256


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
